"""The processor threads of a measurement."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trivium.registry import UserError


@contextmanager
def processor_threads(count: int | None) -> Iterator[int]:
    """Let torch compute with `count` threads inside (None: as many as it does now), and yield how many these are.

    Raises UserError for a count below 1.
    """
    if count is not None and count < 1:
        raise UserError(f"threads: expected 1 or more, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
