"""trivium bench: times with what they are compared to, as a table, JSON, or a file of results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivium.bench.gates import WrongResult
from trivium.bench.train import SHAPES, bench_train
from trivium.bench.train_gpt2 import LONG_SHAPES, bench_gpt2
from trivium.commands import fail
from trivium.commands.flags import parse
from trivium.report.storage import reserve, write_whole


@dataclass(frozen=True)
class TrainBenchOptions:
    shape: Literal["all", "2.1M", "0.1M", "6.3M", "124M", "hybrid"] = "all"
    """Model to time: 2.1M (width 256, 4 layers, batch 64 x 32 tokens) or 0.1M (the quickstart's size) on the processor,
    6.3M (GPT-2 with 8 layers, batch 1024 x 18) on a GPU, or all of these; 124M (GPT-2 small, batch 32 x 1024) or hybrid
    (its five layers and three 2-simplicial ones) on a GPU."""
    repeats: int = 3
    """Repeats of each cell; the table shows medians."""
    threads: int | None = None
    """Processor threads of both programs (default: what torch takes)."""
    steps: int | None = None
    """Steps of each repeat (default: 60, 210 and 600)."""
    json: bool = False
    """Print the results as JSON on standard output."""
    out: Path | None = None
    """File to write the results to, such as benchmarks/results/train.json."""


def train(arguments: Sequence[str]) -> int:
    """Time our training step beside transformers' Trainer."""
    options = parse(
        TrainBenchOptions, arguments, "trivium bench train", "Time our training beside transformers' Trainer."
    )
    shapes = tuple(SHAPES) if options.shape == "all" else (options.shape,)
    reserve(options.out)
    try:
        if options.shape in LONG_SHAPES:
            results = bench_gpt2(options.shape, repeats=options.repeats, threads=options.threads, steps=options.steps)
        else:
            results = bench_train(shapes, repeats=options.repeats, threads=options.threads, steps=options.steps)
    except WrongResult as error:
        return fail(str(error))
    if not keep(results, options.json, options.out):
        _show_training(results)
    return 0


def keep(results: dict[str, Any], as_json: bool, out: Path | None) -> bool:
    """Write the results to `out` if it is given, and print them if `as_json`; say whether they were printed."""
    text = json.dumps(results, indent=1)
    if out is not None:
        write_whole(out, text + "\n")
    if as_json:
        print(text)
    return as_json


def _show_training(results: dict[str, Any]) -> None:
    table = Table(title=f"{results['benchmark']}: {results['unit']}, {results['threads']} threads")
    for column in ("model", "row", "trivium", "Trainer", "ratio", "note"):
        table.add_column(column, justify="left" if column in ("model", "row", "note") else "right")
    for row in results["rows"]:
        numbers = [f"{row[name]:.2f}" if name in row else "–" for name in ("trivium", "trainer", "ratio")]
        table.add_row(row["model"], row["row"], *numbers, Text(row["note"]))
    console = Console()
    console.print(table)
    environment = results["environment"]
    console.print(
        f"{environment['processor']}, torch {environment['torch']}, transformers {environment['transformers']}, "
        f"commit {environment['commit']}"
    )
