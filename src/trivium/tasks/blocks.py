"""Small batches that follow each other, cut from a block of problems: numpy's overhead is by the call."""

from collections.abc import Callable

import numpy as np

from trivium.tasks.base import Batch, Split

BLOCK = 4096
BLOCK_TOKENS = 2**20


class Blocks:
    """Batches of a task's problems of up to `longest` tokens, which `encode(split, indices)` makes.

    What a batch holds does not depend on how it was made.
    """

    def __init__(self, longest: int, encode: Callable[[Split, np.ndarray], Batch]):
        self.rows = max(1, min(BLOCK, BLOCK_TOKENS // longest))
        self.encode = encode
        self._last: int | None = None  # first index of the last batch
        self._block: tuple[int, Batch] | None = None

    def batch(self, split: Split, indices_B: np.ndarray) -> Batch:
        """Return the problems at `indices_B` of `split`."""
        if not self._follows(split, indices_B):
            return self.encode(split, indices_B)
        block, offset = divmod(int(indices_B[0]), self.rows)
        if offset + len(indices_B) > self.rows:
            return self.encode(split, indices_B)
        if self._block is None or self._block[0] != block:
            first = block * self.rows
            self._block = block, self.encode(split, np.arange(first, first + self.rows))
        return self._block[1].take(np.arange(offset, offset + len(indices_B)))

    def _follows(self, split: Split, indices_B: np.ndarray) -> bool:
        """Say whether a small batch comes soon after the last one, as the steps of training or one's share of them."""
        rows, last = len(indices_B), self._last
        if split != "train" or not 0 < rows <= self.rows // 4 or (np.diff(indices_B) != 1).any():
            return False
        start = int(indices_B[0])
        self._last = start
        return last is not None and 0 < start - last <= 4 * rows
