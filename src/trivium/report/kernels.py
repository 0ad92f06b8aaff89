"""The figure of the kernels: rates over tokens and heads, from the file that `trivium bench ops --sweep` writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.registry import UserError
from trivium.report.figures import rates, save
from trivium.report.style import Series, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each pass has the colour and marker of one name of the house's palette.
_LOOKS = {"forward": "simplicial", "backward": "attention"}


def kernel_figure(results: Mapping[str, Any]) -> "Figure":
    """Draw forward and backward TFLOPS of the fastest backend over T, one curve for each number of query heads.

    Rates are of replays of a CUDA graph where the results have them: the host's launches do not hide short kernels.
    """
    best: dict[tuple[str, int], dict[int, float]] = {}
    how = ""
    for row in results["rows"]:
        if row.get("sweep") and not row["peer"] and "tflops" in row and row["pass"] in _LOOKS:
            curve = best.setdefault((row["pass"], row["heads"]), {})
            if "graph_tflops" in row:
                how = ", replayed"
            curve[row["tokens"]] = max(curve.get(row["tokens"], 0.0), row.get("graph_tflops", row["tflops"]))
    if not best:
        raise UserError("these results hold no sweep over tokens and heads; run trivium bench ops --sweep --out FILE")
    names = {f"{kind}, {heads} heads": (kind, heads) for kind, heads in sorted(best, key=lambda key: (key[0], -key[1]))}
    looks = styles({name: _LOOKS[kind] for name, (kind, _) in names.items()})
    series = []
    for name, key in names.items():
        tokens = sorted(best[key])
        series.append(Series(name, looks[name], tokens, [best[key][count] for count in tokens]))
    return rates(
        series,
        label=f"2-simplicial attention, TFLOPS on one {results['environment']['device_name']}{how}",
        ceiling=results["matmul_tflops"],
        ceiling_name=f"{results['matrix']}\u00b3 matrix product",
        width=6.6,
    )


def write_kernel_figure(results: Mapping[str, Any], path: Path) -> Path:
    """Write the figure to `path` (.svg or .png)."""
    return save(kernel_figure(results), path)
