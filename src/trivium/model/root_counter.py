"""The online prefix scan of many rows at once, in tensors of fixed shape: rows may push at different times.

It keeps the bracketing of trivium.ops.scan. Level r of a row holds the root of a complete subtree of 2^r chunks, and
the left fold of it with all higher ones, where the number of chunks pushed has bit r; elsewhere its content is stale.

Shapes: B rows, N of them that push, R levels, c places of a chunk, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.mixers.base import State


@dataclass
class RootCounter(State):
    """Root and fold of each level."""

    roots_BRcD: Tensor
    folds_BRcD: Tensor


def num_roots(length: int, chunk: int) -> int:
    """Return the most roots that a row holds within `length` tokens: ceil(log2(m + 1)) of m whole chunks."""
    return (length // chunk).bit_length()


def num_merges(pushed: int) -> int:
    """Return the merges that the last of `pushed` chunks brought: the trailing zeros of the count."""
    return (pushed & -pushed).bit_length() - 1


def put(old: Tensor, at: tuple[Tensor, ...], new: Tensor, wanted_N: Tensor | None) -> Tensor:
    """Return `old` with `new` at the indices, where wanted (None: everywhere); in place under no_grad."""
    new = new.to(old.dtype)
    if wanted_N is not None:
        new = torch.where(wanted_N.view(-1, *[1] * (new.ndim - 1)), new, old[at])
    return old.index_put(at, new) if torch.is_grad_enabled() else old.index_put_(at, new)


def push(
    counter: RootCounter,
    combine: Callable[[Tensor, Tensor], Tensor],
    rows_N: Tensor,
    chunk_NcD: Tensor,
    pushed_N: Tensor,
    wanted_N: Tensor | None,
    most: int | None = None,
) -> tuple[RootCounter, Tensor]:
    """Push one chunk in each of `rows_N` (int64, no repeats) behind its `pushed_N` chunks; return the new prefixes.

    With `wanted_N` None every row named pushes, and each level costs its own rows alone. With a mask the others keep
    what they have: every row computes every level, and no value decides what runs, so that it can be captured. `most`
    says that no wanted row merges more than that many trees, so that higher levels need no work.
    """
    levels_R = torch.arange(counter.roots_BRcD.shape[1], device=rows_N.device)
    bits_NR = pushed_N[:, None] >> levels_R & 1
    # The trees to merge are the trailing ones of the count.
    level_N = bits_NR.cumprod(dim=1).sum(dim=1).clamp(max=len(levels_R) - 1)
    tree_NcD = chunk_NcD
    for level in range(len(levels_R) if most is None else min(most, len(levels_R))):
        carries_N = level_N > level
        if wanted_N is None and not bool(carries_N.any()):
            break
        tree_NcD = _combine(combine, counter.roots_BRcD[rows_N, level], tree_NcD, carries_N, wanted_N is None)
    above_NR = bits_NR * (levels_R > level_N[:, None])
    fold_NcD = counter.folds_BRcD[rows_N, above_NR.argmax(dim=1)]
    prefix_NcD = _combine(combine, fold_NcD, tree_NcD, above_NR.any(dim=1), wanted_N is None)
    at = (rows_N, level_N)
    new = RootCounter(
        put(counter.roots_BRcD, at, tree_NcD, wanted_N), put(counter.folds_BRcD, at, prefix_NcD, wanted_N)
    )
    return new, prefix_NcD


def _combine(
    combine: Callable[[Tensor, Tensor], Tensor], left_NcD: Tensor, right_NcD: Tensor, needed_N: Tensor, select: bool
) -> Tensor:
    """Return combine(left, right) in the rows that need it and `right` in the others, which have no left side."""
    left_NcD = left_NcD.to(right_NcD.dtype)
    if not select:
        return torch.where(needed_N[:, None, None], combine(left_NcD, right_NcD), right_NcD)
    rows_A = needed_N.nonzero()[:, 0]
    if not len(rows_A):
        return right_NcD
    combined_AcD = combine(left_NcD[rows_A], right_NcD[rows_A])
    return right_NcD.to(combined_AcD.dtype).index_copy(0, rows_A, combined_AcD)
