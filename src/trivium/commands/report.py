"""trivium report: draw pages again from what runs and studies left in their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from trivium.commands.flags import parse
from trivium.registry import UserError
from trivium.report.run import write_report


@dataclass(frozen=True)
class ReportOptions:
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, study folders or results.json files."""


def report(arguments: Sequence[str]) -> None:
    """Write report.html beside each and say where it is."""
    options = parse(ReportOptions, arguments, "trivium report", "Draw report.html from run or study folders.")
    if not options.paths:
        raise UserError("give at least one run folder, study folder or results.json")
    for path in options.paths:
        print(write_report(path))
