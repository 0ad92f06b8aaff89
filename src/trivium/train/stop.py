"""Why a run stops before its end, and how it hears that it should."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class TrainingStopped(RuntimeError):  # noqa: N818 (an interruption is no error)
    """A run that ended early. `step` steps are done; `checkpoint` is the newest good one, None when there is none."""

    # All that it is made of goes to the base class, so that the other processes of a run can be sent it.
    def __init__(self, message: str, step: int, checkpoint: Path | None, *more: object):
        super().__init__(message, step, checkpoint, *more)
        self.message = message
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint"
        return f"{self.message}; {kept}"


class Interrupted(TrainingStopped):
    """SIGINT or SIGTERM came; a checkpoint was written, and the same command continues from it."""


class TrainingDiverged(TrainingStopped):
    """The loss or the gradient norm was not finite; `indices` are those of the batch that gave it."""

    def __init__(self, message: str, step: int, checkpoint: Path | None, indices: list[int]):
        super().__init__(message, step, checkpoint, indices)
        self.indices = indices


class StorageFailed(TrainingStopped):
    """A checkpoint could not be written or did not read back as written, for example because the disk is full."""


class StopRequest:
    """What the signal handlers have heard: the name of the first signal, or None.

    `at_once`, when set, makes the error that the next signal raises where it strikes, instead of being noted.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.at_once: Callable[[str], TrainingStopped] | None = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the checkpoint
        self.signal = signal.Signals(number).name
        if self.at_once is not None:
            raise self.at_once(self.signal)


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM instead of dying from them; only the main thread can, elsewhere nothing is noted."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
