"""The figure of `trivium bench latency`: milliseconds a token, and bytes of state, against the position."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trivium.report.axes import stacked_axes
from trivium.report.figures import growth
from trivium.report.style import Series, look, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (("milliseconds a token", "milliseconds"), ("bytes of state", "state_bytes"))


def latency_figure(results: Mapping[str, Any], *, width: float = 7.0) -> "Figure":
    """Draw both against the position on log axes; bands hold the steps from the 10th to the 90th percentile.

    The largest merge of a prefix scan stands by itself, as a cross. `width` is in inches.
    """
    rows = [row for row in results["rows"] if row["points"]]
    looks = styles({row["name"]: row["mixer"] for row in rows})
    with look():
        height = max(2.6, 0.19 * len(rows) + 0.9)
        figure, panels = stacked_axes(width, height, len(_PANELS), [row["name"] for row in rows])
        for axes, (label, what) in zip(panels, _PANELS, strict=True):
            series = []
            for row in rows:
                places = [point["position"] for point in row["points"]]
                if what == "milliseconds":
                    spreads = [point["milliseconds"] for point in row["points"]]
                    low, middle, high = ([spread[key] for spread in spreads] for key in ("p10", "median", "p90"))
                    series.append(Series(row["name"], looks[row["name"]], places, middle, low, high))
                else:
                    series.append(Series(row["name"], looks[row["name"]], places, _bytes(row)))
            growth(figure, axes, series, label=label)
            if what == "milliseconds":
                _mark_worst(axes, rows, looks)
        panels[-1].set_xlabel("position (tokens)")
    return figure


def _bytes(row: Mapping[str, Any]) -> list[float]:
    return [point["state_bytes"] for point in row["points"]]


def _mark_worst(axes: "Axes", rows: list[Any], looks: Mapping[str, Any]) -> None:
    for row in rows:
        if row["worst"] is not None:
            milliseconds = row["worst"]["milliseconds"]["median"]
            colour = looks[row["name"]].colour
            axes.plot([row["worst"]["position"]], [milliseconds], marker="x", color=colour, linestyle="", zorder=4)
