"""Axes of figures: where ticks stand, and names beside the curves that they name."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trivium.report.spread import spread
from trivium.report.style import FONT, POINTS, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def short_count(value: float) -> str:
    """Return a count as people say it: 950, 12 k, 1.5 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def apart(ticks: Sequence[float], axes: "Axes") -> list[float]:
    """Return those of the ascending `ticks`, on a log axis, whose labels leave each other room; the last is kept."""
    inches = axes.get_window_extent().width / axes.figure.dpi
    span = math.log(ticks[-1] / ticks[0]) or 1.0
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or math.log(kept[-1] / tick) / span * inches >= 0.3:
            kept.append(tick)
    return kept[::-1]


def one_axes(width: float, height: float, *, left: float, right: float) -> "tuple[Figure, Axes]":
    """Return a figure with one axes; margins in inches, so that text keeps its room at any size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    left, right = min(left, 0.45 * width), min(right, 0.45 * width)
    bottom, top = 0.55, 0.35
    rectangle = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure, figure.add_axes(rectangle)


def stacked_axes(width: float, height: float, count: int, names: Sequence[str]) -> "tuple[Figure, list[Axes]]":
    """Return a figure with axes of `height` inches above each other, and room right of them for the names."""
    figure, first = one_axes(width, count * height, left=0.72, right=text_inches(names) + 0.68)
    box = first.get_position()
    bottom, top = 0.55 / height / count, 0.35 / height / count
    places = [(count - 1 - nth) / count for nth in range(count)]
    first.remove()
    return figure, [figure.add_axes((box.x0, place + bottom, box.width, 1 / count - bottom - top)) for place in places]


def limits(values: Sequence[float], percent: bool) -> tuple[float, float]:
    if percent:
        low = min(values, default=0.0)
        # Room that shows how near to certain a rate is, and never less than a point.
        return max(-0.01, low - max(0.005, 0.08 * (1 - low))), 1.0 + max(0.001, 0.02 * (1 - low))
    positive = [value for value in values if value > 0]
    return (min(positive) / 1.25, max(positive) * 1.25) if positive else (1.0, 10.0)


def tokens_axis(axes: "Axes", low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter

    low, high = low / 1.06, high * 1.06
    axes.set_xlim(low, high)
    inches = axes.get_window_extent().width / axes.figure.dpi
    axes.xaxis.set_major_locator(FixedLocator(round_ticks(low, high, most=inches / 0.58)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))


def round_ticks(low: float, high: float, most: float) -> list[float]:
    """Return round numbers within low .. high for a log axis, as many as leave each other 1 / `most` of its length."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    least = math.log10(high / low) / most
    best: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        for every in (3, 2, 1):
            ticks = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
            ticks = [tick for tick in ticks if low <= tick <= high]
            gaps = [math.log10(after / before) for before, after in pairwise(ticks)]
            if len(ticks) > len(best) and min(gaps, default=least) >= least:
                best = ticks
    if len(best) >= 2:
        return best
    # A short axis: numbers of two digits, each as soon as the one before leaves it room.
    chosen: list[float] = []
    for tick in (digits * 10.0 ** (power - 1) for power in range(first, last + 1) for digits in range(10, 100)):
        if low <= tick <= high and (not chosen or math.log10(tick / chosen[-1]) >= least):
            chosen.append(tick)
    return chosen


def loss_axis(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_ends(figure: "Figure", axes: "Axes", series: Sequence[Series]) -> None:
    """Write each name right of the axes, level with its curve's end as far as the names leave each other room."""
    if not series:
        return
    to_points = POINTS / figure.dpi
    axes.get_ylim()  # settles the limits, on which transData depends
    box = axes.get_window_extent()
    ends = [axes.transData.transform((curve.tokens[-1], curve.values[-1])) for curve in series]
    # Curves that end alike, at 100 % say, are named in the order in which they got there.
    levels = [sum(curve.values) / len(curve.values) for curve in series]
    ranks = {index: rank for rank, index in enumerate(sorted(range(len(series)), key=lambda index: levels[index]))}
    # Ends closer than a quarter of a line count as alike.
    near = FONT / 4
    heights = [
        near * round(float(end[1] - box.y0) * to_points / near) + 1e-3 * ranks[nth] for nth, end in enumerate(ends)
    ]
    places = spread(heights, gap=1.3 * FONT, low=0.0, high=float(box.height) * to_points)
    for curve, end, place in zip(series, ends, places, strict=True):
        y = place / (float(box.height) * to_points)
        x_end = float(end[0] - box.x0) / float(box.width)
        y_end = float(end[1] - box.y0) / float(box.height)
        gap, key = (1 + points / (float(box.width) * to_points) for points in (14, 34))
        style = curve.style
        look: dict[str, Any] = {"transform": axes.transAxes, "color": style.colour, "clip_on": False}
        axes.plot([x_end, gap], [y_end, y], linewidth=0.7, alpha=0.7, **look)
        axes.plot([gap, key], [y, y], linestyle=style.line, **look)
        axes.plot([(gap + key) / 2], [y], marker=style.marker, markersize=5, markerfacecolor=style.face, **look)
        axes.annotate(
            curve.name,
            (key, y),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=curve.style.colour,
            annotation_clip=False,
        )


def text_inches(names: Sequence[str]) -> float:
    from matplotlib.textpath import TextPath

    widths = [TextPath((0, 0), name, size=FONT).get_extents().width for name in names if name.strip()]
    return max(widths, default=0.0) / POINTS
