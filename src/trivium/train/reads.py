"""What the forward passes of a training step read. Shapes: B examples of one pass, T tokens, N scored tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from trivium.tasks.base import Batch


class Read(NamedTuple):
    """What one forward pass reads: tokens, the places in the flattened B*T that are scored, their targets, weights.

    The entries are arrays on the way to a device and tensors on it. `documents_BT` numbers the documents packed into a
    row; None where each row is one.
    """

    tokens_BT: Any
    wanted_N: Any
    targets_N: Any
    weights_N: Any
    documents_BT: Any = None

    def each(self, function: Callable[[Any], Any]) -> "Read":
        """Return this with `function` of each entry that there is."""
        return Read(*(None if entry is None else function(entry) for entry in self))

    def given(self) -> dict[str, Any]:
        """Return what the model is told beside the tokens."""
        return {} if self.documents_BT is None else {"documents_BT": self.documents_BT}


def room(count: int, least: int = 1) -> int:
    """Return a number from `count` up that is among 16 to each power of two, and a multiple of `least`, a power of two;
    so that few shapes come up.
    """
    step = max(1 << max(0, count.bit_length() - 5), least)
    return -(-count // step) * step


def reads(
    batch: Batch, weights_BT: np.ndarray, micro_batch: int | None = None, *, longest: int | None = None, pad_id: int = 0
) -> list[Read]:
    """Return what each forward pass of a step on `batch` reads; logits are made only where they are scored.

    With `longest`, the most tokens of any batch, rows are filled up with `pad_id` and the scored places with others,
    whose weight is 0, to a `room`: batches then share a few shapes, and the loss is the same.
    """
    tokens_BT, targets_BT, documents_BT = batch.tokens_BT, batch.targets_BT, batch.documents_BT
    missing = 0 if longest is None else min(room(tokens_BT.shape[1]), longest) - tokens_BT.shape[1]
    if missing > 0:
        behind = ((0, 0), (0, missing))
        tokens_BT, targets_BT = (np.pad(x, behind, constant_values=pad_id) for x in (tokens_BT, targets_BT))
        weights_BT = np.pad(weights_BT, behind)
        if documents_BT is not None:
            documents_BT = np.pad(documents_BT, behind, mode="edge")
    part = micro_batch or len(batch)
    parts = [slice(start, start + part) for start in range(0, len(batch), part)]
    scored = [np.flatnonzero(weights_BT[rows]) for rows in parts]
    if longest is not None:
        wanted = room(max(len(wanted_N) for wanted_N in scored), 16)
        spare = [np.flatnonzero(weights_BT[rows] == 0) for rows in parts]
        scored = [
            np.sort(np.concatenate((a, b[: max(wanted - len(a), 0)]))) for a, b in zip(scored, spare, strict=True)
        ]
    return [
        Read(
            tokens_BT[rows],
            wanted_N,
            targets_BT[rows].ravel()[wanted_N],
            weights_BT[rows].ravel()[wanted_N],
            None if documents_BT is None else documents_BT[rows],
        )
        for rows, wanted_N in zip(parts, scored, strict=True)
    ]
