"""The only place that draws: one visual language for every figure of the project.

Colours and markers are those of trivium.report.style. Spread and intervals are bands, tokens are on a log axis, and
names stand beside what they name. Figures are made without pyplot, so no display and no global state is involved.
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from trivium.report.axes import (
    apart,
    label_ends,
    limits,
    loss_axis,
    one_axes,
    short_count,
    text_inches,
    tokens_axis,
)
from trivium.report.storage import make_folders, write_whole
from trivium.report.style import FAINT, FONT, GRID, INK, MIXERS, POINTS, Row, Series, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def learning_curves(
    series: Sequence[Series],
    *,
    label: str,
    percent: bool = False,
    thresholds: Sequence[float] = (),
    width: float = 5.4,
    axis: str = "training tokens",
) -> "Figure":
    """Draw values against training tokens: rates from 0 to 100 %, or a loss on a log axis.

    `width` is in inches, `axis` says which tokens are counted. `thresholds` are drawn as thin lines across.
    """
    with look():
        names = [curve.name for curve in series]
        figure, axes = one_axes(width, 3.5, right=text_inches(names) + 0.68, left=0.72)
        for curve in series:
            _curve(axes, curve)
        axes.set_xscale("log")
        for threshold in thresholds:
            axes.axhline(threshold, color=FAINT, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        if percent:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        elif all(value > 0 for curve in series for value in curve.values):
            axes.set_yscale("log")
            loss_axis(axes)
        tokens = [count for curve in series for count in curve.tokens if count > 0]
        if tokens:
            tokens_axis(axes, min(tokens), max(tokens))
        axes.set_xlabel(axis)
        axes.set_title(label, loc="left", fontsize=FONT + 1, fontweight="bold")
        label_ends(figure, axes, [curve for curve in series if len(curve.values)])
    return figure


def rates(series: Sequence[Series], *, label: str, ceiling: float, ceiling_name: str, width: float = 5.4) -> "Figure":
    """Draw rates against the tokens of a sequence, under the line of the rate that bounds them."""
    with look():
        figure, axes = one_axes(width, 3.5, right=text_inches([curve.name for curve in series]) + 0.68, left=0.72)
        for curve in series:
            _curve(axes, curve)
        axes.set_xscale("log")
        axes.axhline(ceiling, color=FAINT, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        axes.set_ylim(0, 1.12 * max([ceiling, *(value for curve in series for value in curve.values)]))
        axes.annotate(ceiling_name, (0.01, ceiling), (0, 3), ("axes fraction", "data"), "offset points", color=FAINT)
        tokens = [count for curve in series for count in curve.tokens]
        tokens_axis(axes, min(tokens), max(tokens))
        axes.set_xlabel("tokens of a sequence")
        axes.set_title(label, loc="left", fontsize=FONT + 1, fontweight="bold")
        label_ends(figure, axes, series)
    return figure


def length_curves(
    series: Sequence[Series], *, label: str, trained: float | None = None, width: float = 5.4
) -> "Figure":
    """Draw rates from 0 to 100 % against the length read, on a log axis; a line marks the longest length `trained` on.

    The `tokens` of each curve are its lengths.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    with look():
        figure, axes = one_axes(width, 3.5, right=text_inches([curve.name for curve in series]) + 0.68, left=0.72)
        for curve in series:
            _curve(axes, curve)
        lengths = sorted({length for curve in series for length in curve.tokens})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(apart(lengths, axes)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        if trained is not None:
            axes.axvline(trained, color=FAINT, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_xlabel("length" if trained is None else f"length (trained on up to {trained:g}, the thin line)")
        axes.set_title(label, loc="left", fontsize=FONT + 1, fontweight="bold")
        label_ends(figure, axes, [curve for curve in series if len(curve.values)])
    return figure


def length_map(
    rates: Mapping[tuple[int, int], float | None],
    *,
    label: str,
    names: tuple[str, str],
    trained: float | None = None,
    width: float = 5.0,
) -> "Figure":
    """Draw rates at pairs of lengths as a map, the first to the right: the darker, the higher, and the percentage
    in each cell. `names` are those of the axes; a line bounds the lengths up to `trained`. A missing rate stays empty.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    firsts, seconds = (sorted({pair[axis] for pair in rates}) for axis in (0, 1))
    shown = [[rates.get((first, second)) for first in firsts] for second in seconds]
    with look():
        height = 0.9 + (width - 0.9) * len(seconds) / len(firsts)
        figure, axes = one_axes(width, height, left=0.72, right=0.18)
        colours = LinearSegmentedColormap.from_list("rates", ["#FFFFFF", "#8FB8D8", MIXERS["attention"][0]])
        values = [[math.nan if rate is None else rate for rate in row] for row in shown]
        axes.imshow(values, cmap=colours, vmin=0, vmax=1, origin="lower", aspect="auto")
        size = min(FONT - 2, 0.42 * POINTS * (width - 0.9) / len(firsts))
        for y, row in enumerate(shown):
            for x, rate in enumerate(row):
                if rate is not None:
                    # Rounded down, so that 100 stands for all.
                    text = f"{math.floor(100 * rate + 1e-9)}"
                    ink = "white" if rate > 0.6 else INK
                    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=size)
        if trained is not None:
            inside = [sum(length <= trained for length in lengths) for lengths in (firsts, seconds)]
            axes.add_patch(Rectangle((-0.5, -0.5), *inside, fill=False, edgecolor=MIXERS["simplicial"][0], linewidth=2))
        axes.set_xticks(range(len(firsts)), [str(length) for length in firsts])
        axes.set_yticks(range(len(seconds)), [str(length) for length in seconds])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title(label, loc="left", fontsize=FONT + 1, fontweight="bold")
    return figure


def intervals(rows: Sequence[Row], *, label: str, percent: bool = False, width: float = 5.4) -> "Figure":
    """Draw one row a name: its interval as a band, its mean, and each seed; tokens (not `percent`) on a log axis."""
    from matplotlib.ticker import MaxNLocator

    with look():
        height = 0.95 + 0.42 * max(1, len(rows))
        figure, axes = one_axes(width, height, right=0.35, left=text_inches([row.name for row in rows]) + 0.2)
        ends = [value for row in rows for value in (row.mean, row.low, row.high, *row.values) if value is not None]
        if percent:
            # An interval of a rate ends at the rates there are.
            ends = [min(1.0, max(0.0, value)) for value in ends]
        low, high = limits(ends, percent)
        if not percent:
            axes.set_xscale("log")
        for place, row in enumerate(rows):
            _dot_row(axes, row, place, (0.0, 1.0) if percent else (low, high))
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(row.style.colour)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        if percent:
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        else:
            tokens_axis(axes, low, high)
        axes.set_title(label, loc="left", fontsize=FONT + 1, fontweight="bold", x=0.0)
    return figure


def growth(figure: "Figure", axes: "Axes", series: Sequence[Series], *, label: str) -> None:
    """Draw positive values against tokens, both on log axes."""
    for curve in series:
        _curve(axes, curve)
    axes.set_xscale("log")
    axes.set_yscale("log")
    tokens = [count for curve in series for count in curve.tokens]
    tokens_axis(axes, min(tokens), max(tokens) * 1.0001)
    loss_axis(axes)
    axes.yaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.set_title(label, loc="left", fontsize=FONT + 1, fontweight="bold")
    label_ends(figure, axes, series)


def to_svg(figure: "Figure") -> str:
    """Return `figure` as SVG text, the same for the same data: without dates, and without links to anywhere."""
    buffer = BytesIO()
    with look():
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue().decode()


def save(figure: "Figure", path: Path) -> Path:
    """Write `figure` to `path` as its suffix says (.svg or .png) and return the path."""
    make_folders(path.parent)
    if path.suffix == ".svg":
        write_whole(path, to_svg(figure))
        return path
    buffer = BytesIO()
    with look():
        figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=160)
    write_whole(path, buffer.getvalue())
    return path


def _curve(axes: "Axes", curve: Series) -> None:
    style = curve.style
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.tokens, curve.low, curve.high, color=style.colour, alpha=0.16, linewidth=0)
    every = max(1, len(curve.tokens) // 8)
    axes.plot(
        curve.tokens,
        curve.values,
        color=style.colour,
        linestyle=style.line,
        marker=style.marker,
        markersize=5,
        markerfacecolor=style.face,
        markevery=every,
        zorder=3,
    )


def _dot_row(axes: "Axes", row: Row, place: int, bounds: tuple[float, float]) -> None:
    style = row.style
    if row.low is not None and row.high is not None:
        left, right = max(bounds[0], row.low), min(bounds[1], row.high)
        axes.barh(place, right - left, 0.5, left=left, color=style.colour, alpha=0.2, linewidth=0, zorder=2)
    axes.scatter(row.values, [place] * len(row.values), s=14, color=style.colour, alpha=0.55, linewidths=0, zorder=3)
    if row.mean is not None:
        axes.plot(
            [row.mean],
            [place],
            marker=style.marker,
            markersize=8,
            color=style.colour,
            markerfacecolor=style.face,
            markeredgewidth=1.5,
            zorder=4,
        )
    if row.note:
        anchor = max([value for value in (row.mean, *row.values) if value is not None], default=None)
        if anchor is None:
            axes.text(0.02, place, row.note, transform=axes.get_yaxis_transform(), va="center", color=FAINT)
        else:
            axes.annotate(
                row.note,
                (anchor, place),
                xytext=(0, -13),
                textcoords="offset points",
                ha="center",
                va="center",
                color=FAINT,
                fontsize=FONT - 2,
            )
