"""trivium bench generate: our generation beside transformers' on the same weights, as a table or JSON."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from trivium.bench.gates import WrongResult
from trivium.bench.generate import bench_generate
from trivium.commands import fail
from trivium.commands.bench import keep
from trivium.commands.flags import parse
from trivium.report.storage import reserve
from trivium.train.precision import choose_device, choose_precision


@dataclass(frozen=True)
class GenerateBenchOptions:
    """The 6.33 M GPT-2 answers 10,000 sums greedily, so many prompts a call."""

    batches: tuple[int, ...] = (1, 1_000, 10_000)
    """Prompts a call, a row of the table each."""
    digits: int = 4
    """Digits of both numbers, zero-padded."""
    repeats: int = 3
    """Repeats of each cell; the table shows medians."""
    seconds: float = 10.0
    """No call begins after so many seconds of a repeat."""
    device: str = "auto"
    """Device to run on."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and state in both programs (auto: bfloat16 where the device has it, else float32)."""
    threads: int | None = None
    """Processor threads of both programs (default: what torch takes)."""
    json: bool = False
    """Print the results as JSON on standard output."""
    out: Path | None = None
    """File to write the results to, such as benchmarks/results/generate_gpu.json."""


def generate(arguments: Sequence[str]) -> int:
    """Time our generation beside transformers' generate."""
    options = parse(
        GenerateBenchOptions, arguments, "trivium bench generate", "Time our generation beside transformers' generate."
    )
    device = choose_device(options.device)
    dtype = choose_precision(options.precision, device).dtype
    reserve(options.out)
    try:
        results = bench_generate(
            options.batches,
            device=device,
            dtype=dtype,
            digits=options.digits,
            repeats=options.repeats,
            seconds=options.seconds,
            threads=options.threads,
            on_progress=lambda line: print(line, file=sys.stderr),
        )
    except WrongResult as error:
        return fail(str(error))
    if not keep(results, options.json, options.out):
        _show(results)
    return 0


def _show(results: dict[str, Any]) -> None:
    table = Table(
        title=f"{results['benchmark']}: {results['unit']}; {results['precision']}, {results['threads']} threads"
    )
    for column in ("prompts a call", "trivium", "transformers", "ratio", "prompts timed"):
        table.add_column(column, justify="right")
    for row in results["rows"]:
        timed = f"{row['trivium_prompts']:,} and {row['transformers_prompts']:,}"
        numbers = (f"{row['batch']:,}", f"{row['trivium']:,.0f}", f"{row['transformers']:,.0f}", f"{row['ratio']:.1f}")
        table.add_row(*numbers, timed)
    console = Console()
    console.print(table)
    best = results["best"]
    compared = [
        f"{best[name]:.1f} times transformers {words} ({best[name + '_prompts']:,} prompts timed)"
        for name, words in (("one_at_a_time", "one prompt at a time"), ("batched", "at its best batch"))
        if best[name] is not None
    ]
    console.print(f"our best, {best['trivium_batch']:,} prompts a call: {', '.join(compared)}")
    environment = results["environment"]
    console.print(
        f"{environment.get('device_name') or environment['processor']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}, commit {environment['commit']}"
    )
