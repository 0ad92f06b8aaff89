"""Pages: one self-contained HTML file each, which opens without a network."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.report.figures import to_svg
from trivium.report.storage import write_whole
from trivium.report.tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure on a page; `text` says in words what it shows, for those who cannot see it."""

    figure: "Figure"
    text: str

    @property
    def address(self) -> str:
        """The figure as a data address. An image keeps each figure's ids to itself, which inline SVG would not."""
        return "data:image/svg+xml;base64," + base64.b64encode(to_svg(self.figure).encode()).decode()


@dataclass(frozen=True)
class Sample:
    """One answer of a model: right or wrong, and why."""

    prompt: str
    generated: str
    wanted: str
    correct: bool
    reason: str = ""


@dataclass(frozen=True)
class Section:
    """A titled part of a page. What is empty is left out; `samples` are (name, colour, answers)."""

    title: str
    words: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[tuple[str, str, Sequence[Sample]]] = ()
    code: str = ""
    folded: tuple[str, str] | None = None

    @property
    def anchor(self) -> str:
        """Name of the section in links to it."""
        return "-".join("".join(letter if letter.isalnum() else " " for letter in self.title.lower()).split())


def write_page(path: Path, *, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write the page to `path` and return that; raise OSError naming `path`, where a page of before then stays."""
    text = render_page(title=title, subtitle=subtitle, sections=sections)
    write_whole(path, text)
    return path


def render_page(**content: Any) -> str:
    """Return the page as text; every value is escaped."""
    return templates().get_template("page.html.jinja").render(**content)


def templates() -> "Environment":
    """Return the templates of this room, which escape every value that is not marked as safe."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("trivium.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def samples_of(evaluation: dict[str, Any], each: int) -> list[Sample]:
    """Return up to `each` right and `each` wrong answers, wrong ones first."""
    rows = [row for verdict in ("wrong", "right") for row in evaluation.get(verdict, [])[:each]]
    return [Sample(*(row[key] for key in ("prompt", "generated", "wanted", "correct", "reason"))) for row in rows]
