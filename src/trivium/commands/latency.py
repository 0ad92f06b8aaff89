"""trivium bench latency: milliseconds a generated token and bytes of state against the position, table and figure."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from trivium.bench.latency import MARKS, bench_latency, room_for
from trivium.bench.latency_gpt2 import bench_gpt2
from trivium.bench.latency_models import timed_models
from trivium.commands.bench import keep
from trivium.commands.flags import parse
from trivium.model.block import check_backends
from trivium.registry import UserError
from trivium.report.storage import check_figure, reserve
from trivium.train.environment import describe_environment
from trivium.train.precision import choose_device, choose_precision

MODELS = (
    "attention",
    "attention(window=512)",
    "simplicial",
    "gla",
    "gated_deltanet",
    "gru",
    *(f"prefix_scan(chunk={chunk})" for chunk in (32, 64, 128, 256)),
)


@dataclass(frozen=True)
class LatencyOptions:
    """Models to time, at equal layers and width, with random weights unless they are runs."""

    models: tuple[str, ...] = MODELS
    """Layer patterns (one layer stands for all), prefix_scan(chunk=N), and folders of runs."""
    width: int = 256
    """Width of the models with random weights."""
    heads: int = 4
    """Their heads."""
    layers: int = 4
    """Their layers; of a prefix scan half aggregate and half predict."""
    positions: Literal["none", "learned", "sinusoidal", "rotary"] = "none"
    """How decoders with random weights number tokens."""
    backends: dict[str, str] = field(default_factory=dict)
    """Backend of each operator that should not be chosen automatically, such as {gated_delta_rule: torch}."""
    marks: tuple[int, ...] = MARKS
    """Positions at which steps are timed."""
    steps: int = 64
    """Timed steps at each mark; a prefix scan takes whole chunks, so at least one chunk."""
    batch: int = 1
    """Rows that generate side by side; a time is that of one token in every row."""
    transformers: bool = False
    """Time GPT-2 of transformers beside them."""
    device: str = "auto"
    """Device to run on."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and state (auto: bfloat16 on a GPU that has it, float32 on a CPU)."""
    threads: int | None = None
    """Processor threads (default: what torch takes)."""
    clock: Literal["wall", "processor"] = "wall"
    """Time on the wall, or (on a busy machine, with one thread) what this process computed."""
    json: bool = False
    """Print the results as JSON on standard output."""
    out: Path | None = None
    """File to write the results to (default: results.json in the working folder, if --json is not given)."""
    figure: Path | None = None
    """File of the figure, .svg or .png (default: beside the results, with their name)."""


def latency(arguments: Sequence[str]) -> None:
    """Time single-token steps at growing positions."""
    options = parse(LatencyOptions, arguments, "trivium bench latency", "Time a generated token against its position.")
    device = choose_device(options.device)
    for name in ("width", "heads", "layers", "steps", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    if not options.marks or min(options.marks) < 1:
        raise UserError("--marks: give positions of 1 or more")
    if not options.models:
        raise UserError("--models: give at least one")
    if options.clock == "processor" and (device.type != "cpu" or options.threads != 1):
        raise UserError("--clock processor: needs --device cpu and --threads 1")
    check_figure(options.figure)
    dtype = torch.float32
    if options.precision != "auto" or device.type == "cuda":
        dtype = choose_precision(options.precision, device).dtype
    sizes: dict[str, Any] = {"width": options.width, "heads": options.heads, "layers": options.layers}
    room = room_for(options.marks, options.steps)
    check_backends(options.backends)
    kinds: dict[str, Any] = {"positions": options.positions, "backends": options.backends}
    models = timed_models(options.models, room=room, **kinds, **sizes)
    out = options.out if options.out is not None or options.json else Path("results.json")
    figure = options.figure or (None if out is None else out.with_suffix(".svg"))
    reserve(out)
    common: dict[str, Any] = {"steps": options.steps, "batch": options.batch, "device": str(device), "dtype": dtype}
    common["clock"] = options.clock
    common["on_progress"] = lambda line: print(line, file=sys.stderr)
    head = {
        "benchmark": "latency",
        "weights": "random, except where a row names a run",
        **sizes,
        **kinds,
        "environment": describe_environment(device),
    }
    beside: list[dict[str, Any]] = []
    if options.transformers:
        beside.append(bench_gpt2(sorted(set(options.marks)), threads=options.threads, **sizes, **common))

    def whole(results: dict[str, Any]) -> dict[str, Any]:
        return {**head, **results, "rows": [*beside, *results["rows"]]}

    def keep_rows(results: dict[str, Any]) -> None:
        """Each row is minutes of timing: what ends the command early leaves those that it has."""
        keep(whole(results), False, out)

    results = whole(bench_latency(models, options.marks, threads=options.threads, on_row=keep_rows, **common))
    printed = keep(results, options.json, out)
    if figure is not None:
        from trivium.report.figures import save
        from trivium.report.latency import latency_figure

        save(latency_figure(results), figure)
        print(f"figure: {figure}", file=sys.stderr)
    if not printed:
        _show(results)


def _show(results: dict[str, Any]) -> None:
    marks = [mark for mark in results["marks"] if any(_at(row, mark) for row in results["rows"])]
    how = "captured graphs" if results["captured"] else f"{results['threads']} threads, {results['clock']} time"
    table = Table(
        title=f"milliseconds a token, {results['batch']} rows, {results['precision']}, {results['device']}, {how}; "
        "random weights unless a run"
    )
    table.add_column("model")
    columns = ("parameters", *(f"{mark:,}" for mark in marks), "last / first", "worst merge", "state KiB", "peak MiB")
    for column in columns:
        table.add_column(column, justify="right")
    for row in results["rows"]:
        points = [_at(row, mark) for mark in marks]
        first, last = row["points"][0], row["points"][-1]
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            *(f"{point['milliseconds']['median']:.3f}" if point else "–" for point in points),
            f"{row['ratio']:.2f}",
            f"{row['worst']['milliseconds']['median']:.3f}" if row["worst"] else "–",
            f"{first['state_bytes'] / 1024:,.0f} to {last['state_bytes'] / 1024:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        )
    console = Console()
    console.print(table)
    environment = results["environment"]
    console.print(f"{environment['device_name']}, torch {environment['torch']}, commit {environment['commit']}")


def _at(row: dict[str, Any], mark: int) -> dict[str, Any] | None:
    return next((point for point in row["points"] if point["position"] == mark), None)
