"""trivium doctor: what this machine, its libraries and the operators can do."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivium.commands.flags import parse
from trivium.doctor import examine


@dataclass(frozen=True)
class DoctorOptions:
    json: bool = False
    """Print the findings as JSON on standard output."""


def doctor(arguments: Sequence[str]) -> None:
    """Print the findings."""
    options = parse(DoctorOptions, arguments, "trivium doctor", "Say what this machine and its libraries can do.")
    findings = examine()
    if options.json:
        print(json.dumps(findings, indent=1))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in findings.items():
        if not isinstance(value, dict):
            table.add_row(name, Text(", ".join(value)))
            continue
        table.add_row(name, "")
        for key, item in value.items():
            lines = [f"{each}: {what}" for each, what in item.items()] if isinstance(item, dict) else [str(item)]
            table.add_row(f"  {key}", Text("\n".join(lines)))
    Console().print(table)
