"""The order of the training problems: a pure function of the step, so that a resumed run sees the same ones."""

import numpy as np

from trivium.config import UserError
from trivium.tasks.base import Batch, Task


class TrainStream:
    """Batches of `batch_examples` problems of the train split, cut into one slice for each process.

    With `batch_tokens` a stage of a curriculum has as many examples as fit at its own longest length. A training set
    without end is read from (seed << 40) on, so that seeds never share an index. A finite one is read in a new order
    each epoch, a permutation keyed by (seed, epoch); a batch may reach across epochs.
    """

    def __init__(self, task: Task, batch_examples: int, seed: int = 0, *, batch_tokens: int | None = None):
        if batch_examples < 1:
            raise UserError(f"batch: expected 1 or more examples, got {batch_examples}")
        if not 0 <= seed < 2**23:
            raise UserError(f"seed: expected 0 to {2**23 - 1}, got {seed}")
        self.task = task
        self.batch_examples = batch_examples
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.examples_in_epoch = task.size("train")
        if self.examples_in_epoch == 0:
            raise UserError("the train split has no problems")
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int, size: int) -> np.ndarray:
        if epoch not in self._orders:
            order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(size)
            newest = sorted(self._orders)[-1:]
            self._orders = {kept: self._orders[kept] for kept in newest} | {epoch: order}
        return self._orders[epoch]

    def examples_at(self, stage: int) -> int:
        """Return the examples of a batch in `stage` of a curriculum (0: the whole task), over all processes."""
        if stage == 0 or self.batch_tokens is None:
            return self.batch_examples
        return self.batch_tokens // (self.task.staged(stage).max_length - 1)

    def indices(self, step: int, stage: int = 0) -> np.ndarray:
        """Return the indices (int64) of the problems of `step`, counted from 0, over all processes together."""
        count = self.examples_at(stage)
        places = np.arange(step * count, (step + 1) * count, dtype=np.int64)
        if self.examples_in_epoch is None:
            return places + (np.int64(self.seed) << np.int64(40))
        epochs, places = np.divmod(places, self.examples_in_epoch)
        parts = [
            self._order(int(epoch), self.examples_in_epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts).astype(np.int64)

    def batch(self, step: int, rank: int = 0, world: int = 1, stage: int = 0) -> Batch:
        """Return the slice of `step` that process `rank` of `world` trains on; slices differ by at most one row.

        `stage` is that of a curriculum, see `Task`.
        Raises UserError when there are more processes than examples in a batch.
        """
        return self.task.gather("train", self.indices_of(step, rank, world, stage), stage)

    def indices_of(self, step: int, rank: int = 0, world: int = 1, stage: int = 0) -> np.ndarray:
        """Return the indices of the problems that `batch` returns for the same arguments."""
        if world > self.batch_examples:
            raise UserError(f"batch: {self.batch_examples} examples cannot be shared among {world} processes")
        return np.array_split(self.indices(step, stage), world)[rank]
