"""Log lines for people: which backend and precision the program chose, and why, on standard error."""

import logging

from rich.console import Console
from rich.logging import RichHandler


def announce() -> None:
    """Let the program's log lines through to standard error, each once."""
    log = logging.getLogger("trivium")
    if not any(isinstance(handler, RichHandler) for handler in log.handlers):
        console = Console(stderr=True)
        log.addHandler(RichHandler(console=console, show_time=False, show_level=False, show_path=False, markup=False))
    log.setLevel(logging.INFO)
