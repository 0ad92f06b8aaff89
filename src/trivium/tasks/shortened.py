"""Batches whose chains of thought lack tokens.

Shapes: B rows, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.tasks.base import CHAIN, PAD, PROMPT, Batch


@dataclass(frozen=True)
class Backwards:
    """The numbers of a text that go from their last digit on: runs of `digits` behind `opening`, as far as `closing`
    (token ids)."""

    opening: int
    closing: int
    digits: tuple[int, ...]

    def turns(self, batch: Batch) -> np.ndarray:
        """Return for each token of the texts (B, T + 1) the place whose turn it takes: its own, or that of its mirror
        image in such a number."""
        text_BT = np.concatenate((batch.tokens_BT[:, :1], batch.targets_BT), axis=1)
        inside_BT = (text_BT == self.opening).cumsum(axis=1) > (text_BT == self.closing).cumsum(axis=1)
        inside_BT &= np.isin(text_BT, self.digits)
        place_T = np.arange(text_BT.shape[1])
        before_BT = np.maximum.accumulate(np.where(inside_BT, -1, place_T), axis=1)
        behind_BT = np.where(inside_BT, len(place_T), place_T)[:, ::-1]
        behind_BT = np.minimum.accumulate(behind_BT, axis=1)[:, ::-1]
        return np.where(inside_BT, before_BT + behind_BT - place_T, place_T)


def without_chain(
    batch: Batch,
    count: np.ndarray | int,
    pad_id: int,
    backwards: Backwards | None = None,
    keep_brackets: bool = False,
) -> Batch:
    """Return `batch` with texts whose chains of thought lack their first `count` tokens, brackets not counted.

    A count for each row is an array (B,). `backwards` names the numbers that lose their last digits first.

    Where no other is left the brackets go too, unless `keep_brackets`. Needs next-token targets, chains that follow
    the prompt.
    """
    if not np.any(count):
        return batch
    chain_B = (batch.regions_BT == CHAIN).sum(axis=1)
    if keep_brackets:
        gone_B = np.minimum(count, np.maximum(chain_B - 2, 0))
    else:
        gone_B = np.where((count >= chain_B - 2) & (np.asarray(count) > 0), chain_B, count)
    first_B = batch.prompt_lengths_B + (keep_brackets | (gone_B < chain_B))  # the opening bracket stays until the end
    # Column j of what is kept is token j of the whole text, the target of column j - 1.
    place_T = np.arange(batch.tokens_BT.shape[1] + 1)
    turn_BT = place_T if backwards is None else backwards.turns(batch)
    in_chain_BT = (turn_BT >= first_B[:, None]) & (turn_BT < (first_B + gone_B)[:, None])
    kept_BT = ~in_chain_BT & (place_T <= batch.lengths_B[:, None])
    lengths_B = kept_BT.sum(axis=1) - 1
    width = int(lengths_B.max(initial=-1)) + 1
    filled_BT = np.arange(width) <= lengths_B[:, None]

    def moved(first_B1: np.ndarray, rest_BT: np.ndarray, behind: Any) -> np.ndarray:
        moved_BT = np.full((len(batch), width), behind, dtype=rest_BT.dtype)
        moved_BT[filled_BT] = np.concatenate((first_B1, rest_BT), axis=1)[kept_BT]
        return moved_BT

    none_B1 = np.zeros((len(batch), 1), dtype=np.int64)
    text_BT = moved(batch.tokens_BT[:, :1], batch.targets_BT, pad_id)
    inside_BT = np.arange(width - 1) < lengths_B[:, None]
    documents_BT = batch.documents_BT
    if documents_BT is not None:
        documents_BT = moved(documents_BT[:, :1], np.roll(documents_BT, -1, axis=1), 0)[:, :-1]
    return Batch(
        np.where(inside_BT, text_BT[:, :-1], pad_id),
        text_BT[:, 1:],
        moved(none_B1.astype(np.float32), batch.weights_BT, 0)[:, 1:],
        moved((none_B1 + PROMPT).astype(np.uint8), batch.regions_BT, PAD)[:, 1:],
        lengths_B,
        batch.prompt_lengths_B,
        documents_BT,
    )
