"""Tokens that are alike before anything mixes them: one symbol at one place is one vector, however often it occurs.

Shapes: B rows, T places, V symbols, U distinct tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FEWER = 4  # times as many tokens as distinct ones, from which sorting them pays


class Alike(NamedTuple):
    """The distinct tokens of a stream, and which of them stands at each place."""

    rows_UD: Tensor
    index_BT: Tensor


def find_alike(embedding_VD: Tensor, added_TD: Tensor | None, tokens_BT: Tensor) -> Alike | None:
    """Return every symbol at every place once, with what is added there, or None where that is no small part of the
    tokens, or where torch.compile, which must not ask, looks on."""
    places = 1 if added_TD is None else tokens_BT.shape[1]
    if torch.compiler.is_compiling() or FEWER * len(embedding_VD) * places > tokens_BT.numel():
        return None
    if added_TD is None:
        return Alike(embedding_VD, tokens_BT)
    rows_VTD = embedding_VD[:, None] + added_TD
    return Alike(rows_VTD.flatten(0, 1), tokens_BT * places + torch.arange(places, device=tokens_BT.device))
