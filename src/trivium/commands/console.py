"""Log lines for people: which backend and precision the program chose, and why, on standard error."""

import logging
import sys


class _Lines(logging.Handler):
    """Prints each message as one line, however long. It looks standard error up anew: live progress replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def announce(level: int = logging.INFO) -> None:
    """Let the program's log lines from `level` on through to standard error."""
    log = logging.getLogger("trivium")
    if not any(isinstance(handler, _Lines) for handler in log.handlers):
        log.addHandler(_Lines())
    log.setLevel(level)
