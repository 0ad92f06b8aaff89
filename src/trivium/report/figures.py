"""The only place that draws: one visual language for every figure of the project.

A mixer has one colour and one marker everywhere; variants of the same mixer differ by line and by filled or open
markers, so that a figure reads in grey. Spread and intervals are bands, tokens are on a log axis, and names stand
beside what they name. Figures are made without pyplot, so no display and no global state is involved.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from trivium.report.spread import spread
from trivium.report.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's hues, darkened where their text would be too pale on white.
_MIXERS = {
    "attention": ("#0060A0", "o"),
    "local": ("#2A9FC4", "s"),
    "simplicial": ("#D0500A", "^"),
    "gla": ("#00845F", "D"),
    "gated_deltanet": ("#B0508A", "v"),
    "prefix_scan": ("#A87400", "P"),
    "gru": ("#5A6B2F", "p"),
}
_OTHERS = (("#6A51A3", "X"), ("#7A7A00", "<"), ("#A04040", ">"), ("#006070", "h"), ("#805030", "8"), ("#555555", "*"))
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 1.6, 1.2, 1.6)))
_INK, _FAINT, _GRID = "#222222", "#666666", "#DDDDDD"
_FONT = 10.0
_POINTS = 72.0

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trivium",
    "font.size": _FONT,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Style:
    """How one variant looks in every figure."""

    colour: str
    marker: str
    line: Any
    filled: bool

    @property
    def face(self) -> str:
        """Colour inside the markers."""
        return self.colour if self.filled else "white"


# For what is not a variant, such as the training loss beside the validation loss.
PLAIN = Style("#777777", "d", _LINES[1], filled=False)


@dataclass(frozen=True)
class Series:
    """One named curve: its points are means over seeds, `low` and `high` bound the spread over them."""

    name: str
    style: Style
    tokens: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Row:
    """One named row of a dot figure: the mean, its interval, and the value of each seed."""

    name: str
    style: Style
    mean: float | None
    low: float | None
    high: float | None
    values: Sequence[float]
    note: str = ""


def styles(mixers: Mapping[str, str]) -> dict[str, Style]:
    """Return the style of each name in `mixers` (variant -> the mixer that sets it apart)."""
    seen: dict[str, int] = {}
    chosen = {}
    for name, mixer in mixers.items():
        colour, marker = _MIXERS.get(mixer) or _OTHERS[crc32(mixer.encode()) % len(_OTHERS)]
        nth = seen.get(mixer, 0)
        seen[mixer] = nth + 1
        chosen[name] = Style(colour, marker, _LINES[nth % len(_LINES)], filled=nth % 2 == 0)
    return chosen


@contextmanager
def look() -> Iterator[None]:
    """Draw in this module's language."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


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
        figure, axes = _axes(width, 3.5, right=_text_inches(names) + 0.68, left=0.72)
        for curve in series:
            _curve(axes, curve)
        axes.set_xscale("log")
        for threshold in thresholds:
            axes.axhline(threshold, color=_FAINT, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        if percent:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        elif all(value > 0 for curve in series for value in curve.values):
            axes.set_yscale("log")
            _loss_axis(axes)
        tokens = [count for curve in series for count in curve.tokens if count > 0]
        if tokens:
            _tokens_axis(axes, min(tokens), max(tokens))
        axes.set_xlabel(axis)
        axes.set_title(label, loc="left", fontsize=_FONT + 1, fontweight="bold")
        _label_ends(figure, axes, [curve for curve in series if len(curve.values)])
    return figure


def rates(series: Sequence[Series], *, label: str, ceiling: float, ceiling_name: str, width: float = 5.4) -> "Figure":
    """Draw rates against the tokens of a sequence, under the line of the rate that bounds them."""
    with look():
        figure, axes = _axes(width, 3.5, right=_text_inches([curve.name for curve in series]) + 0.68, left=0.72)
        for curve in series:
            _curve(axes, curve)
        axes.set_xscale("log")
        axes.axhline(ceiling, color=_FAINT, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        axes.set_ylim(0, 1.12 * max([ceiling, *(value for curve in series for value in curve.values)]))
        axes.annotate(ceiling_name, (0.01, ceiling), (0, 3), ("axes fraction", "data"), "offset points", color=_FAINT)
        tokens = [count for curve in series for count in curve.tokens]
        _tokens_axis(axes, min(tokens), max(tokens))
        axes.set_xlabel("tokens of a sequence")
        axes.set_title(label, loc="left", fontsize=_FONT + 1, fontweight="bold")
        _label_ends(figure, axes, series)
    return figure


def length_curves(
    series: Sequence[Series], *, label: str, trained: float | None = None, width: float = 5.4
) -> "Figure":
    """Draw rates from 0 to 100 % against the length read, on a log axis; a line marks the longest length `trained` on.

    The `tokens` of each curve are its lengths.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    with look():
        figure, axes = _axes(width, 3.5, right=_text_inches([curve.name for curve in series]) + 0.68, left=0.72)
        for curve in series:
            _curve(axes, curve)
        lengths = sorted({length for curve in series for length in curve.tokens})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(_apart(lengths, axes)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        if trained is not None:
            axes.axvline(trained, color=_FAINT, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_xlabel("length" if trained is None else f"length (trained on up to {trained:g}, the thin line)")
        axes.set_title(label, loc="left", fontsize=_FONT + 1, fontweight="bold")
        _label_ends(figure, axes, [curve for curve in series if len(curve.values)])
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
        figure, axes = _axes(width, height, left=0.72, right=0.18)
        colours = LinearSegmentedColormap.from_list("rates", ["#FFFFFF", "#8FB8D8", _MIXERS["attention"][0]])
        values = [[math.nan if rate is None else rate for rate in row] for row in shown]
        axes.imshow(values, cmap=colours, vmin=0, vmax=1, origin="lower", aspect="auto")
        size = min(_FONT - 2, 0.42 * _POINTS * (width - 0.9) / len(firsts))
        for y, row in enumerate(shown):
            for x, rate in enumerate(row):
                if rate is not None:
                    # Rounded down, so that 100 stands for all.
                    text = f"{math.floor(100 * rate + 1e-9)}"
                    ink = "white" if rate > 0.6 else _INK
                    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=size)
        if trained is not None:
            inside = [sum(length <= trained for length in lengths) for lengths in (firsts, seconds)]
            axes.add_patch(
                Rectangle((-0.5, -0.5), *inside, fill=False, edgecolor=_MIXERS["simplicial"][0], linewidth=2)
            )
        axes.set_xticks(range(len(firsts)), [str(length) for length in firsts])
        axes.set_yticks(range(len(seconds)), [str(length) for length in seconds])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title(label, loc="left", fontsize=_FONT + 1, fontweight="bold")
    return figure


def intervals(rows: Sequence[Row], *, label: str, percent: bool = False, width: float = 5.4) -> "Figure":
    """Draw one row a name: its interval as a band, its mean, and each seed; tokens (not `percent`) on a log axis."""
    from matplotlib.ticker import MaxNLocator

    with look():
        height = 0.95 + 0.42 * max(1, len(rows))
        figure, axes = _axes(width, height, right=0.35, left=_text_inches([row.name for row in rows]) + 0.2)
        ends = [value for row in rows for value in (row.mean, row.low, row.high, *row.values) if value is not None]
        if percent:
            # An interval of a rate ends at the rates there are.
            ends = [min(1.0, max(0.0, value)) for value in ends]
        low, high = _limits(ends, percent)
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
        axes.grid(axis="x", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        if percent:
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        else:
            _tokens_axis(axes, low, high)
        axes.set_title(label, loc="left", fontsize=_FONT + 1, fontweight="bold", x=0.0)
    return figure


def stacked_axes(width: float, height: float, count: int, names: Sequence[str]) -> "tuple[Figure, list[Axes]]":
    """Return a figure with axes of `height` inches above each other, and room right of them for the names."""
    figure, first = _axes(width, count * height, left=0.72, right=_text_inches(names) + 0.68)
    box = first.get_position()
    bottom, top = 0.55 / height / count, 0.35 / height / count
    places = [(count - 1 - nth) / count for nth in range(count)]
    first.remove()
    return figure, [figure.add_axes((box.x0, place + bottom, box.width, 1 / count - bottom - top)) for place in places]


def growth(figure: "Figure", axes: "Axes", series: Sequence[Series], *, label: str) -> None:
    """Draw positive values against tokens, both on log axes."""
    for curve in series:
        _curve(axes, curve)
    axes.set_xscale("log")
    axes.set_yscale("log")
    tokens = [count for curve in series for count in curve.tokens]
    _tokens_axis(axes, min(tokens), max(tokens) * 1.0001)
    _loss_axis(axes)
    axes.yaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.set_title(label, loc="left", fontsize=_FONT + 1, fontweight="bold")
    _label_ends(figure, axes, series)


def to_svg(figure: "Figure") -> str:
    """Return `figure` as SVG text, the same for the same data: without dates, and without links to anywhere."""
    buffer = BytesIO()
    with look():
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue().decode()


def save(figure: "Figure", path: Path) -> Path:
    """Write `figure` to `path` as its suffix says (.svg or .png) and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        write_whole(path, to_svg(figure))
        return path
    buffer = BytesIO()
    with look():
        figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=160)
    write_whole(path, buffer.getvalue())
    return path


def short_count(value: float) -> str:
    """Return a count as people say it: 950, 12 k, 1.5 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _apart(ticks: Sequence[float], axes: "Axes") -> list[float]:
    """Return those of the ascending `ticks`, on a log axis, whose labels leave each other room; the last is kept."""
    inches = axes.get_window_extent().width / axes.figure.dpi
    span = math.log(ticks[-1] / ticks[0]) or 1.0
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or math.log(kept[-1] / tick) / span * inches >= 0.3:
            kept.append(tick)
    return kept[::-1]


def _axes(width: float, height: float, *, left: float, right: float) -> "tuple[Figure, Axes]":
    """Return a figure with one axes; margins in inches, so that text keeps its room at any size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    left, right = min(left, 0.45 * width), min(right, 0.45 * width)
    bottom, top = 0.55, 0.35
    rectangle = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure, figure.add_axes(rectangle)


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
            axes.text(0.02, place, row.note, transform=axes.get_yaxis_transform(), va="center", color=_FAINT)
        else:
            axes.annotate(
                row.note,
                (anchor, place),
                xytext=(0, -13),
                textcoords="offset points",
                ha="center",
                va="center",
                color=_FAINT,
                fontsize=_FONT - 2,
            )


def _limits(values: Sequence[float], percent: bool) -> tuple[float, float]:
    if percent:
        low = min(values, default=0.0)
        # Room that shows how near to certain a rate is, and never less than a point.
        return max(-0.01, low - max(0.005, 0.08 * (1 - low))), 1.0 + max(0.001, 0.02 * (1 - low))
    positive = [value for value in values if value > 0]
    return (min(positive) / 1.25, max(positive) * 1.25) if positive else (1.0, 10.0)


def _tokens_axis(axes: "Axes", low: float, high: float) -> None:
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


def _loss_axis(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(figure: "Figure", axes: "Axes", series: Sequence[Series]) -> None:
    """Write each name right of the axes, level with its curve's end as far as the names leave each other room."""
    if not series:
        return
    to_points = _POINTS / figure.dpi
    axes.get_ylim()  # settles the limits, on which transData depends
    box = axes.get_window_extent()
    ends = [axes.transData.transform((curve.tokens[-1], curve.values[-1])) for curve in series]
    # Curves that end alike, at 100 % say, are named in the order in which they got there.
    levels = [sum(curve.values) / len(curve.values) for curve in series]
    ranks = {index: rank for rank, index in enumerate(sorted(range(len(series)), key=lambda index: levels[index]))}
    # Ends closer than a quarter of a line count as alike.
    near = _FONT / 4
    heights = [
        near * round(float(end[1] - box.y0) * to_points / near) + 1e-3 * ranks[nth] for nth, end in enumerate(ends)
    ]
    places = spread(heights, gap=1.3 * _FONT, low=0.0, high=float(box.height) * to_points)
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


def _text_inches(names: Sequence[str]) -> float:
    from matplotlib.textpath import TextPath

    widths = [TextPath((0, 0), name, size=_FONT).get_extents().width for name in names if name.strip()]
    return max(widths, default=0.0) / _POINTS
