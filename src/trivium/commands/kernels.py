"""The part of `trivium bench ops` that times the kernels of 2-simplicial attention on a GPU, or beside peers."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivium.bench.kernels import DECODED, SWEEP, TARGETS, bench_kernels, load_peer, peers_at_hand
from trivium.bench.ops import SimplicialShape
from trivium.registry import UserError

NOTHING = "–"


def measure_kernels(
    shape: SimplicialShape | None, backends: Sequence[str], peers: Sequence[str], *, sweep: bool, **settings: Any
) -> dict[str, Any]:
    """Return the results at `shape`, or at the shapes of public kernels; `settings` are bench_kernels's."""
    theirs = dict(load_peer(text) for text in peers)
    on_gpu = settings["device"].startswith("cuda")
    if sweep and not on_gpu:
        raise UserError("--sweep: takes a GPU, --device cuda")
    results = bench_kernels(
        TARGETS if shape is None else [shape],
        backends or None,
        decoded=DECODED if shape is None else [shape],
        peers=peers_at_hand() | theirs,
        sweep=SWEEP if sweep else (),
        **settings,
    )
    return triton_version() | results


def triton_version() -> dict[str, str | None]:
    """Return what results say of the Triton that compiled the kernels."""
    return {"triton": version("triton") if find_spec("triton") else None}


def read_kernels(path: Path) -> dict[str, Any]:
    """Return what an earlier run wrote to `path`; raise UserError where it does not hold that."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--read: {path}: {error}") from error
    if not isinstance(results, dict) or "matmul_tflops" not in results or results.get("benchmark") != "ops":
        raise UserError(f"--read: {path} does not hold what trivium bench ops measured on a GPU")
    return results


def show_kernels(results: Mapping[str, Any]) -> None:
    """Print a table of the rows, and the rates that they stand beside."""
    product = f"{results['matrix']}³ product"
    title = f"{results['operator']}, {results['form']}, {results['dtype']}, {results['environment']['device_name']}"
    table = Table(title=title)
    for column in ("shape", "pass", "backend", "ms", "TFLOPS", f"of {product}", "peak MiB", "error", "note"):
        table.add_column(column, justify="left" if column in ("shape", "pass", "backend", "note") else "right")
    for row in results["rows"]:
        names = [row["shape"], row["pass"], Text(row["backend"])]
        if "not_run" in row:
            table.add_row(*names, *[NOTHING] * 5, Text(f"not run: {row['not_run']}"))
            continue
        peak = NOTHING if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        note = f"{row['times_floor']:.2f} times its floor" if "times_floor" in row else ""
        if "graph_seconds" in row:
            note = f"{1e3 * row['graph_seconds']:.3g} ms replayed"
        numbers = [f"{1e3 * row['seconds']:.3g}", f"{row['tflops']:.3g}", f"{row['share']:.2f}", peak]
        table.add_row(*names, *numbers, f"{row['relative_error']:.0e}", note)
    console = Console()
    console.print(table)
    rates = f"{product}: {results['matmul_tflops']:.3g} TFLOPS; copy: {results['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    console.print(f"{rates}. FLOPs: 4 D for each allowed (query head, j, k) forward, 2.5 times that backward")
