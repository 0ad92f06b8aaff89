"""trivium bench tokenise: tokens a second from a text to a corpus, beside tiktoken alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from trivium.bench.gates import WrongResult
from trivium.bench.tokenise import bench_tokenise
from trivium.commands import fail
from trivium.commands.bench import keep
from trivium.commands.flags import parse
from trivium.data.corpora import local_sources
from trivium.data.tokenise import processors
from trivium.registry import UserError
from trivium.report.storage import reserve


@dataclass(frozen=True)
class TokeniseOptions:
    from_: Annotated[Path, tyro.conf.arg(name="from")]
    """File, or folder of files, of text."""
    tokenizer: str = "gpt2"
    """Byte pairs: a folder with a tokenizer's files, or a hub id such as gpt2."""
    field: str = "text"
    """Field of JSON or Parquet rows that is the text."""
    jobs: int | None = None
    """Processes that make the corpus, and threads of tiktoken (default: one for each processor)."""
    repeats: int = 3
    """Repeats of each row; the table shows medians."""
    json: bool = False
    """Print the results as JSON on standard output."""
    out: Path | None = None
    """File to write the results to."""


def tokenise(arguments: Sequence[str]) -> int:
    """Time making a corpus of a text, and print tokens a second."""
    options = parse(TokeniseOptions, arguments, "trivium bench tokenise", "Time the making of a corpus of text.")
    jobs = processors() if options.jobs is None else options.jobs
    for name, value in (("jobs", jobs), ("repeats", options.repeats)):
        if value < 1:
            raise UserError(f"--{name}: expected 1 or more, got {value}")
    sources = local_sources(options.from_)
    reserve(options.out)
    try:
        found = bench_tokenise(sources, options.tokenizer, key=options.field, jobs=jobs, repeats=options.repeats)
    except WrongResult as error:
        return fail(str(error))
    if not keep(found, options.json, options.out):
        _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['tokens']:,} tokens of {found['documents']:,} documents, {found['jobs']} jobs")
    table.add_column("row")
    table.add_column("M tokens/s", justify="right")
    for row in found["rows"]:
        table.add_row(row["row"], f"{row['tokens_per_second']['median'] / 1e6:.2f}")
    console = Console()
    console.print(table)
    seconds = found["rows"][0]["seconds"]
    console.print(
        f"a corpus in {seconds['whole']:.1f} s: {seconds['reading']:.1f} s of reading, {seconds['tokenising']:.1f} s "
        "of tokenising, of which the rate is"
    )
    environment = found["environment"]
    console.print(f"{environment['processor']}, tiktoken {found['tiktoken']}, commit {environment['commit']}")
