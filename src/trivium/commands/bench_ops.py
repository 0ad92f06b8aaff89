"""trivium bench ops: an operator's backends beside the reference on a CPU, and beside the chip's own rates on a GPU."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivium.bench.gates import WrongResult
from trivium.bench.kernels import (
    DECODED,
    PASSES,
    SWEEP,
    TARGETS,
    bench_kernels,
    kernels_at_hand,
    load_peer,
    peers_at_hand,
)
from trivium.bench.ops import bench_simplicial
from trivium.bench.shapes import SimplicialShape
from trivium.commands import fail
from trivium.commands.bench import _keep, _reserve
from trivium.commands.flags import parse
from trivium.registry import UserError
from trivium.report.kernels import write_kernel_figure
from trivium.train.environment import describe_environment
from trivium.train.precision import choose_device

SIZES = tuple(field.name for field in fields(SimplicialShape))
RULE = "FLOPs: 4 D for each allowed (query head, j, k) forward, 2.5 times that backward"


@dataclass(frozen=True)
class OpsBenchOptions:
    """Sizes to time; a backend is found right first. Without any on a GPU: the shapes of public kernels."""

    op: Literal["simplicial"] = "simplicial"
    """Operator to time."""
    batch: int | None = None
    """Rows (default: 2)."""
    tokens: int | None = None
    """Tokens of a row; before the one that is decoded too (default: 512)."""
    heads: int | None = None
    """Query heads (default: 4)."""
    kv_heads: int | None = None
    """Key/value heads (default: as many as query heads)."""
    head_width: int | None = None
    """Width of a head (default: 32)."""
    window1: int | None = None
    """Window of the first keys and values (default: 128)."""
    window2: int | None = None
    """Window of the second keys and values (default: 16)."""
    form: Literal["trilinear", "determinant", "factorized"] = "trilinear"
    """Form of the logits."""
    backends: tuple[str, ...] = ()
    """Backends to time (default: all that this machine has; on a GPU its kernels)."""
    passes: tuple[Literal["forward", "backward", "decode"], ...] = PASSES
    """What to time on a GPU; on a CPU forward and backward are one measurement."""
    peer: tuple[str, ...] = ()
    """NAME=module:function of simplicial_attention's signature, to be timed beside ours."""
    sweep: bool = False
    """Time tokens from 512 to 8192 and 8, 32 and 128 query heads too, which --figure draws."""
    device: str = "auto"
    """Device to run on."""
    repeats: int = 5
    """Repeats of each measurement on a CPU; the table shows medians."""
    threads: int | None = None
    """Processor threads (default: what torch takes)."""
    json: bool = False
    """Print the results as JSON on standard output."""
    out: Path | None = None
    """File to write the results to, such as benchmarks/results/ops.json."""
    figure: Path | None = None
    """File (.svg or .png) for the figure of a sweep."""
    read: Path | None = None
    """File that --out wrote, to be shown and drawn again instead of measuring."""


def ops(arguments: Sequence[str]) -> int:
    """Time each backend of 2-simplicial attention, with its peak memory."""
    options = parse(OpsBenchOptions, arguments, "trivium bench ops", "Time an operator's backends side by side.")
    if options.read is not None:
        results = _read(options.read)
    else:
        _reserve(options.out)
        try:
            results = _measure(options)
        except WrongResult as error:
            return fail(str(error))
    if not _keep(results, options.json, options.out):
        _show_kernels(results) if "matmul_tflops" in results else _show_processor(results)
    if options.figure is not None:
        print(write_kernel_figure(results, options.figure), file=sys.stderr)
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--read: {path}: {error}") from error
    if not isinstance(results, dict) or results.get("benchmark") != "ops" or "rows" not in results:
        raise UserError(f"--read: {path} does not hold results of trivium bench ops")
    return results


def _measure(options: OpsBenchOptions) -> dict[str, Any]:
    device = choose_device(options.device)
    on_gpu, shape = device.type == "cuda", _shape(options)
    progress = lambda line: print(line, file=sys.stderr)  # noqa: E731
    if not on_gpu and not options.peer:
        if options.sweep:
            raise UserError("--sweep: takes a GPU")
        results = bench_simplicial(
            [shape or SimplicialShape()],
            options.backends or None,
            repeats=options.repeats,
            threads=options.threads,
            device=str(device),
            form=options.form,
            on_progress=progress,
        )
    else:
        peers = dict(load_peer(text) for text in options.peer)
        own = [shape] if shape or not on_gpu else None
        settings: dict[str, Any] = {"form": options.form, "device": str(device), "on_progress": progress}
        results = bench_kernels(
            [shape or SimplicialShape()] if own else TARGETS,
            options.backends or None,
            decoded=[shape or SimplicialShape()] if own else DECODED,
            passes=options.passes,
            peers=peers_at_hand() | peers,
            **settings,
        )
        if options.sweep:
            passes = [kind for kind in options.passes if kind != "decode"]
            fastest = options.backends or kernels_at_hand(str(device))[-1:]
            more = bench_kernels(SWEEP, fastest, passes=passes, **settings)
            results["rows"] += [row | {"sweep": True} for row in more["rows"]]
    environment = describe_environment(device) | {"triton": version("triton") if find_spec("triton") else None}
    return {"benchmark": "ops", "environment": environment, **results}


def _shape(options: OpsBenchOptions) -> SimplicialShape | None:
    """Return the shape that the sizes describe, or None where none is given."""
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    for name, value in (given | {"repeats": options.repeats}).items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")
    if not given:
        return None
    if "heads" in given:
        given = {"kv_heads": given["heads"]} | given
    shape = replace(SimplicialShape(), **given)
    if shape.heads % shape.kv_heads:
        raise UserError(f"--kv-heads: {shape.kv_heads} do not divide the {shape.heads} query heads")
    return shape


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("shape", "pass", "backend", "note") else "right")
    return table


def _show_kernels(results: Mapping[str, Any]) -> None:
    matrix = f"{results['matrix']}\u00b3 product"
    title = f"{results['operator']}, {results['form']}, {results['dtype']}, {results['environment']['device_name']}"
    table = _table(title, "shape", "pass", "backend", "ms", "TFLOPS", f"of {matrix}", "peak MiB", "error", "note")
    for row in results["rows"]:
        names = [row["shape"], row["pass"], Text(row["backend"])]
        if "not_run" in row:
            table.add_row(*names, "\u2013", "\u2013", "\u2013", "\u2013", "\u2013", Text(f"not run: {row['not_run']}"))
            continue
        peak = "\u2013" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        note = f"{row['times_floor']:.2f} times its floor" if "times_floor" in row else ""
        if "graph_seconds" in row:
            note = f"{1e3 * row['graph_seconds']:.3g} ms replayed"
        numbers = [f"{1e3 * row['seconds']:.3g}", f"{row['tflops']:.3g}", f"{row['share']:.2f}", peak]
        table.add_row(*names, *numbers, f"{row['relative_error']:.0e}", note)
    console = Console()
    console.print(table)
    copied = results["copy_bytes_per_second"] / 1e9
    console.print(f"{matrix}: {results['matmul_tflops']:.3g} TFLOPS; copy: {copied:.0f} GB/s. {RULE}")


def _show_processor(results: Mapping[str, Any]) -> None:
    title = f"simplicial, {results['form']}, forward + backward, {results['threads']} threads, {results['device']}"
    table = _table(title, "shape", "backend", "ms", "GFLOPS", "peak MiB", "times as fast", "share of memory")
    for row in results["rows"]:
        if "not_run" in row:
            table.add_row(row["shape"], row["backend"], f"not run: {row['not_run']}")
            continue
        compared = [f"{row[name]:.2f}" if name in row else "\u2013" for name in ("times_as_fast", "share_of_memory")]
        numbers = [f"{1e3 * row['forward_backward_seconds']:.1f}", f"{1e3 * row['tflops']:.1f}"]
        table.add_row(row["shape"], row["backend"], *numbers, f"{row['peak_bytes'] / 2**20:.1f}", *compared)
    console = Console()
    console.print(table)
    console.print(RULE)
