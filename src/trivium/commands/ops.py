"""trivium bench ops: an operator's backends side by side, after their results were found right."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from trivium.bench.decode_step import StepShape, bench_decode_steps
from trivium.bench.gates import WrongResult
from trivium.bench.kernels import PASSES
from trivium.bench.linear import RecurrenceShape, bench_recurrence
from trivium.bench.ops import SimplicialShape, bench_simplicial
from trivium.bench.scan import CAPTURED, WHATS, ScanShape, bench_scan
from trivium.commands import fail
from trivium.commands.bench import keep
from trivium.commands.flags import parse
from trivium.commands.kernels import measure_kernels, read_kernels, show_kernels, triton_version
from trivium.registry import UserError
from trivium.report.kernels import write_kernel_figure
from trivium.report.storage import check_figure, reserve
from trivium.train.environment import describe_environment
from trivium.train.precision import choose_device

ALIASES = {"gla": "gated_linear_attention", "gated_delta": "gated_delta_rule"}
# What each operator takes of the sizes below; a size that is left out is the operator's own default.
SHAPES: dict[str, type] = {
    "simplicial": SimplicialShape,
    "gated_linear_attention": RecurrenceShape,
    "gated_delta_rule": RecurrenceShape,
    "scan": ScanShape,
    "decode_step": StepShape,
}
SCAN_WIDTHS = (64, 256)


@dataclass(frozen=True)
class OpsBenchOptions:
    """What to time; a size that the operator does not have is refused. A backend is checked before it is timed."""

    op: Literal[
        "simplicial",
        "gated_linear_attention",
        "gla",
        "gated_delta_rule",
        "gated_delta",
        "scan",
        "decode_step",
    ] = "simplicial"
    """Operator (gla and gated_delta are short names), or decode_step: a step of every mixer against its FLOPs."""
    batch: int | None = None
    """Rows (simplicial 2, decode_step 64, others 4)."""
    tokens: int | None = None
    """Tokens of a row (512)."""
    heads: int | None = None
    """Query heads (4)."""
    kv_heads: int | None = None
    """Key/value heads of simplicial (4)."""
    head_width: int | None = None
    """Width of a head (simplicial 32, gla and gated_delta 64)."""
    window1: int | None = None
    """Window of simplicial's first keys and values (128)."""
    window2: int | None = None
    """Window of simplicial's second keys and values (16)."""
    width: int | None = None
    """Width of scan's model (64 and 256) and of decode_step's mixers (256)."""
    chunks: int | None = None
    """Chunks of scan (64)."""
    chunk: int | None = None
    """Tokens of scan's chunks (8)."""
    context: int | None = None
    """Tokens that a row has seen before decode_step's token (512)."""
    form: Literal["trilinear", "determinant", "factorized"] = "trilinear"
    """Form of simplicial's logits."""
    backends: tuple[str, ...] = ()
    """Backends to time (default: all that this machine has); for decode_step, its mixers."""
    passes: tuple[Literal["forward", "backward", "decode"], ...] = PASSES
    """What of simplicial to time on a GPU; on a CPU forward and backward are one measurement."""
    peer: tuple[str, ...] = ()
    """NAME=module:function of simplicial_attention's signature, to be timed beside it."""
    sweep: bool = False
    """Time simplicial on a GPU at 512 to 8192 tokens and 8, 32 and 128 query heads too, which --figure draws."""
    device: str = "cpu"
    """Device to run on. On cuda, simplicial without sizes is timed at the shapes of public kernels."""
    repeats: int = 5
    """Repeats of each measurement (not of simplicial's on a GPU); the table shows medians."""
    threads: int | None = None
    """Processor threads (default: what torch takes)."""
    json: bool = False
    """Print the results as JSON on standard output."""
    out: Path | None = None
    """File to write the results to, such as benchmarks/results/ops.json; kernels on a GPU leave what a run that was
    ended early has in NAME.partial.json."""
    figure: Path | None = None
    """File (.svg or .png) for the figure of a sweep."""
    read: Path | None = None
    """File that --out wrote on a GPU, to be shown and drawn again instead of measuring."""


def ops(arguments: Sequence[str]) -> int:
    """Time the backends of an operator, forward and backward, with their peak memory."""
    options = parse(OpsBenchOptions, arguments, "trivium bench ops", "Time an operator's backends side by side.")
    operator = ALIASES.get(options.op, options.op)
    check_figure(options.figure)
    if operator != "simplicial" and (options.peer or options.sweep or options.read or options.figure):
        raise UserError(f"--peer, --sweep, --figure and --read: are simplicial's, not of {operator}")
    partial: Path | None = None
    if options.read is not None:
        results = read_kernels(options.read)
    else:
        device = choose_device(options.device)
        sizes = _sizes(options, operator)
        reserve(options.out)
        if options.out is not None:
            partial = options.out.with_suffix(".partial.json")
        head = {"benchmark": "ops", "operator": operator, "environment": describe_environment(device)}

        def keep_rows(results: dict[str, Any]) -> None:
            """Kernels are minutes of timing: what ends the command early leaves the rows that it has beside `out`."""
            keep(head | triton_version() | results, False, partial)

        try:
            results = head | _measure(options, operator, sizes, str(device), keep_rows)
        except WrongResult as error:
            return fail(str(error))
    printed = keep(results, options.json, options.out)
    if partial is not None:
        partial.unlink(missing_ok=True)
    if not printed:
        show = {"simplicial": _show_simplicial, "scan": _show_scan, "decode_step": _show_steps}
        (show_kernels if "matmul_tflops" in results else show.get(operator, _show_recurrence))(results)
    if options.figure is not None:
        print(write_kernel_figure(results, options.figure), file=sys.stderr)
    return 0


def _measure(
    options: OpsBenchOptions,
    operator: str,
    sizes: dict[str, Any],
    device: str,
    on_row: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    common: dict[str, Any] = {"repeats": options.repeats, "threads": options.threads, "device": device}
    show: dict[str, Any] = {"on_progress": lambda line: print(line, file=sys.stderr)}
    if operator == "simplicial":
        shape = SimplicialShape(**sizes)
        if shape.heads % shape.kv_heads:
            raise UserError(f"--kv-heads: {shape.kv_heads} do not divide the {shape.heads} query heads")
        if device != "cpu" or options.peer or options.sweep:
            kernels: dict[str, Any] = {"passes": options.passes, "form": options.form, "device": device}
            kernels["on_row"] = on_row
            chosen = shape if sizes or device == "cpu" else None
            return measure_kernels(chosen, options.backends, options.peer, sweep=options.sweep, **kernels, **show)
        return bench_simplicial([shape], options.backends or None, form=options.form, **common, **show)
    if operator == "scan":
        widths = (sizes.pop("width"),) if "width" in sizes else SCAN_WIDTHS
        return bench_scan(tuple(ScanShape(width, **sizes) for width in widths), **common)
    if operator == "decode_step":
        return bench_decode_steps(StepShape(**sizes), options.backends, **common, **show)
    recurrence: Any = operator
    return bench_recurrence(recurrence, [RecurrenceShape(**sizes)], options.backends or None, **common, **show)


def _sizes(options: OpsBenchOptions, operator: str) -> dict[str, int]:
    """Return the sizes that were given; raise UserError for one that is too small or that the operator lacks."""
    for name, value in (("repeats", options.repeats), ("threads", options.threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name}: expected 1 or more, got {value}")
    names = {field.name for shape in SHAPES.values() for field in fields(shape)}
    known = {field.name for field in fields(SHAPES[operator])}
    given = {name: getattr(options, name) for name in sorted(names) if getattr(options, name) is not None}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in known:
            raise UserError(f"{flag}: {operator} has no such size; allowed: {', '.join(sorted(known))}")
        if value < 1:
            raise UserError(f"{flag}: expected 1 or more, got {value}")
    return given


def _table(title: str, columns: Sequence[str], words: int) -> Table:
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right")
    return table


def _show_simplicial(results: dict[str, Any]) -> None:
    form, threads, device = (results[name] for name in ("form", "threads", "device"))
    title = f"simplicial, {form}, forward + backward, {threads} threads, {device}"
    table = _table(title, ("shape", "backend", "ms", "GFLOPS", "peak MiB", "times as fast", "share of memory"), 2)
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


def _show_recurrence(results: dict[str, Any]) -> None:
    operator, threads, device = (results[name] for name in ("operator", "threads", "device"))
    title = f"{operator}, forward + backward, {threads} threads, {device}"
    table = _table(title, ("shape", "backend", "ms", "tokens/s", "peak MiB", "times as fast"), 2)
    for row in results["rows"]:
        table.add_row(
            row["shape"],
            row["backend"],
            f"{1e3 * row['forward_backward_seconds']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['times_as_fast']:.1f}",
        )
    Console().print(table)


def _show_scan(results: dict[str, Any]) -> None:
    device = results["environment"]["device"]
    title = f"prefix-scan model, forward + backward + AdamW, {results['threads']} threads, {device}"
    table = _table(title, ("shape", "what", "ms by levels", "ms by counter", "times as fast"), 2)
    for row in results["rows"]:
        for what in (what for what in (*WHATS, *CAPTURED) if what in row):
            levels, counter = row[what]["levels"]["median"], row[what]["counter"]["median"]
            table.add_row(row["name"], what, f"{levels:.2f}", f"{counter:.2f}", f"{row[what]['times_faster']:.1f}")
    Console().print(table)


def _show_steps(results: dict[str, Any]) -> None:
    sizes = f"width {results['width']}, {results['batch']} rows, context {results['context']}"
    title = f"one step of generation, {sizes}, {results['threads']} threads, {results['device']}"
    columns = ("mixer", "MFLOP weights", "MFLOP state", "ms", "ms predicted", "ratio")
    table = _table(title, columns, 1)
    for row in results["rows"]:
        numbers = [f"{row[name] / 1e6:.1f}" for name in ("weight_flops", "state_flops")]
        times = [f"{row[name]:.3f}" for name in ("milliseconds", "predicted_milliseconds")]
        table.add_row(row["mixer"], *numbers, *times, f"{row['ratio']:.2f}")
    console = Console()
    console.print(table)
    console.print("predicted: FLOPs at the rates of a linear map and of a batched product in the same run")
