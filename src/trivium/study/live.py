"""What a person sees while a study runs: a live line a run, or plain lines now and then where there is no terminal."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trivium.report.axes import short_count
from trivium.report.tables import MISSING, percent
from trivium.study.jobs import Event

SECONDS_BETWEEN_LINES = 10.0


class LiveProgress:
    """Takes the events of a study and shows them on standard error; a context manager.

    `runs` is the number of runs to come, if it is known. On a terminal the running ones are redrawn in place and
    each line of a finished one stays; elsewhere a line is printed at most every `seconds` for a run.
    """

    def __init__(self, runs: int | None = None, console: Console | None = None, seconds: float = SECONDS_BETWEEN_LINES):
        self.console = console or Console(stderr=True)
        self.runs = runs
        self.seconds = seconds
        self.done = 0
        self._progress: dict[str, dict[str, Any]] = {}
        self._printed: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self._draw(), console=self.console, refresh_per_second=5, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show `event`."""
        name = event.run
        if event.kind in ("started", "progress"):
            self._progress[name] = {**self._progress.get(name, {}), **event.progress}
            self._say_sometimes(name)
        else:
            last = self._progress.pop(name, {})
            self.done += event.kind != "stopped"
            ends = {"kept": "finished earlier", "finished": "finished"}
            message = ends.get(event.kind) or f"{event.kind}: {event.message}"
            numbers = "  ".join(cell for cell in _cells(last)[1:4] if cell != MISSING)
            text = Text(f"{self._count()} {name}  {message}  {numbers}".rstrip())
            text.stylize({"failed": "red", "stopped": "yellow"}.get(event.kind, "green"))
            self.console.print(text, soft_wrap=True)
        if self._live is not None:
            self._live.update(self._draw())

    def _say_sometimes(self, name: str) -> None:
        now = time.monotonic()
        # The first words about a run wait their turn too: a start alone tells nothing.
        if self._live is None and now - self._printed.setdefault(name, now) >= self.seconds:
            self._printed[name] = now
            self.console.print(Text("  ".join((name, *_cells(self._progress[name])))), soft_wrap=True)

    def _count(self) -> str:
        return f"[{self.done}/{self.runs}]" if self.runs else f"[{self.done}]"

    def _draw(self) -> Group:
        table = Table(box=None, pad_edge=False, show_header=bool(self._progress), header_style="dim")
        for title in ("run", "step", "tokens", "loss", "exact match", "tokens/s", "left"):
            table.add_column(title, justify="left" if title == "run" else "right", no_wrap=True)
        for name, progress in self._progress.items():
            table.add_row(Text(name, overflow="ellipsis"), *_cells(progress))
        total = f"{self.done} of {self.runs} runs" if self.runs else f"{self.done} runs"
        return Group(table, Text(f"{total} finished" if self._progress or self.done else "starting ...", style="dim"))


def _cells(progress: dict[str, Any]) -> Sequence[str]:
    """Return step, tokens, loss, exact match, tokens/s and time left as text."""
    if not progress:
        return ("starting", *[MISSING] * 5)
    return (
        f"{progress['step']}/{progress['steps']}",
        short_count(progress["tokens"]),
        f"{progress['loss']:.3f}",
        percent(progress["exact_match"]),
        short_count(progress["tokens_per_second"]),
        _duration(progress["seconds_left"]),
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
