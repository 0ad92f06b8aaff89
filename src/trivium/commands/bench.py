"""trivium bench: times with what they are compared to, as a table, JSON, or a file of results."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivium.bench.gates import WrongResult
from trivium.bench.ops import SimplicialShape, bench_simplicial
from trivium.bench.train import SHAPES, bench_train
from trivium.commands import fail
from trivium.commands.flags import parse
from trivium.registry import UserError
from trivium.report.storage import write_whole
from trivium.train.environment import describe_environment
from trivium.train.precision import choose_device


@dataclass(frozen=True)
class TrainBenchOptions:
    shape: Literal["all", "2.1M", "0.1M"] = "all"
    """Model to time: 2.1M (width 256, 4 layers, batch 64 x 32 tokens), 0.1M (the quickstart's size), or both."""
    repeats: int = 3
    """Repeats of each cell; the table shows medians."""
    threads: int | None = None
    """Processor threads of both programs (default: what torch takes)."""
    steps: int | None = None
    """Steps of each repeat (default: 60 and 210)."""
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
    _reserve(options.out)
    try:
        results = bench_train(shapes, repeats=options.repeats, threads=options.threads, steps=options.steps)
    except WrongResult as error:
        return fail(str(error))
    if not _keep(results, options.json, options.out):
        _show_training(results)
    return 0


@dataclass(frozen=True)
class OpsBenchOptions(SimplicialShape):
    """Sizes to time; a backend is checked against the reference first."""

    batch: int = 2
    """Rows."""
    tokens: int = 512
    """Tokens of a row."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 4
    """Key/value heads."""
    head_width: int = 32
    """Width of a head."""
    window1: int = 128
    """Window of the first keys and values."""
    window2: int = 16
    """Window of the second keys and values."""
    form: Literal["trilinear", "determinant", "factorized"] = "trilinear"
    """Form of the logits."""
    backends: tuple[str, ...] = ()
    """Backends to time (default: all that this machine has)."""
    device: str = "cpu"
    """Device to run on."""
    repeats: int = 5
    """Repeats of each measurement; the table shows medians."""
    threads: int | None = None
    """Processor threads (default: what torch takes)."""
    json: bool = False
    """Print the results as JSON on standard output."""
    out: Path | None = None
    """File to write the results to, such as benchmarks/results/ops.json."""


def ops(arguments: Sequence[str]) -> int:
    """Time each backend of 2-simplicial attention, forward and backward, with its peak memory."""
    options = parse(OpsBenchOptions, arguments, "trivium bench ops", "Time an operator's backends side by side.")
    device = choose_device(options.device)
    shape = SimplicialShape(**{field.name: getattr(options, field.name) for field in fields(SimplicialShape)})
    for name in ("batch", "tokens", "heads", "kv_heads", "head_width", "window1", "window2", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(options, name)}")
    if shape.heads % shape.kv_heads:
        raise UserError(f"--kv-heads: {shape.kv_heads} do not divide the {shape.heads} query heads")
    _reserve(options.out)
    try:
        results = bench_simplicial(
            [shape],
            options.backends or None,
            repeats=options.repeats,
            threads=options.threads,
            device=str(device),
            form=options.form,
            on_progress=lambda line: print(line, file=sys.stderr),
        )
    except WrongResult as error:
        return fail(str(error))
    results = {"benchmark": "ops", "environment": describe_environment(device), **results}
    if _keep(results, options.json, options.out):
        return 0
    title = f"simplicial, {options.form}, forward + backward, {results['threads']} threads, {results['device']}"
    table = Table(title=title)
    for column in ("shape", "backend", "ms", "GFLOPS", "peak MiB", "times as fast", "share of memory"):
        table.add_column(column, justify="left" if column in ("shape", "backend") else "right")
    for row in results["rows"]:
        if "not_run" in row:
            table.add_row(row["shape"], row["backend"], f"not run: {row['not_run']}")
            continue
        compared = [f"{row[name]:.2f}" if name in row else "–" for name in ("times_as_fast", "share_of_memory")]
        numbers = [f"{1e3 * row['forward_backward_seconds']:.1f}", f"{1e3 * row['tflops']:.1f}"]
        table.add_row(row["shape"], row["backend"], *numbers, f"{row['peak_bytes'] / 2**20:.1f}", *compared)
    console = Console()
    console.print(table)
    console.print("FLOPs: 4 D for each allowed (query head, j, k) forward, 2.5 times that backward")
    return 0


def _reserve(out: Path | None) -> None:
    """Find out before minutes of timing that `out` cannot be written; what it holds stays until then."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = not out.exists()
        out.open("a").close()
        if new:  # a benchmark that fails leaves no empty file of results
            out.unlink()


def _keep(results: dict[str, Any], as_json: bool, out: Path | None) -> bool:
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
