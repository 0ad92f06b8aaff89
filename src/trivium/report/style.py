"""How variants look in every figure: a mixer has one colour and one marker everywhere.

Variants of the same mixer differ by line and by filled or open markers, so that a figure reads in grey.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

# Okabe and Ito's hues, darkened where their text would be too pale on white.
MIXERS = {
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
INK, FAINT, GRID = "#222222", "#666666", "#DDDDDD"
FONT = 10.0
POINTS = 72.0

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trivium",
    "font.size": FONT,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
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
        colour, marker = MIXERS.get(mixer) or _OTHERS[crc32(mixer.encode()) % len(_OTHERS)]
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
