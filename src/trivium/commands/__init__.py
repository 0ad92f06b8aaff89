"""The commands: each reads its flags, loads, calls one function of a room below, and prints what came back."""

import sys
import textwrap


def fail(message: str, status: int = 1) -> int:
    """Print an error of one or two lines to standard error and return `status`."""
    lines = textwrap.dedent(message).strip().splitlines() or ["failed"]
    print("trivium: " + "\n".join(lines[:2]), file=sys.stderr)
    return status
