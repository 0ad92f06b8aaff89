"""Prefix scans of any operator, also one that neither commutes nor associates, in one fixed bracketing.

The exclusive prefix s_i combines the chunks x_0 .. x_{i-1}: the binary digits of i, from high to low, name complete
subtrees of the chunks, each reduced as a balanced tree, and s_i is the left fold of their roots (arXiv 2506.10918).
With six chunks, s_5 is ((01)(23))4. `exclusive_scan` computes all of them level by level, as training wants it;
`OnlineScan` one after another, as streaming wants it. Both give the same values.

Chunks are a tensor with the chunks along its first axis, or a sequence of anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

C = TypeVar("C")

__all__ = ["OnlineScan", "exclusive_scan", "num_combines", "prefixes"]


@overload
def exclusive_scan(chunks: Tensor, combine: Callable[[Tensor, Tensor], Tensor], identity: Tensor) -> Tensor: ...
@overload
def exclusive_scan(chunks: Sequence[C], combine: Callable[[C, C], C], identity: C) -> list[C]: ...
def exclusive_scan(chunks: Any, combine: Callable[[Any, Any], Any], identity: Any) -> Any:
    """Return the exclusive prefixes s_0 = identity, s_1 = x_0, ... of m chunks, one for each chunk.

    `chunks` is a tensor (m, ...): `combine` takes two tensors (p, ...) of p independent pairs, earlier chunks left,
    and returns (p, ...); it runs at most 2 log2(m) times. Or `chunks` is a sequence: `combine` takes two items and
    returns one. The identity (a tensor that broadcasts to one chunk) is never combined with anything. At most 2 m
    pairs are combined.
    """
    return prefixes(chunks[:-1], combine, identity)[: len(chunks)]


@overload
def prefixes(chunks: Tensor, combine: Callable[[Tensor, Tensor], Tensor], identity: Tensor) -> Tensor: ...
@overload
def prefixes(chunks: Sequence[C], combine: Callable[[C, C], C], identity: C) -> list[C]: ...
def prefixes(chunks: Any, combine: Callable[[Any, Any], Any], identity: Any) -> Any:
    """Return the m + 1 prefixes s_0 .. s_m of m chunks: as `exclusive_scan`, and the one after the last chunk."""
    if not isinstance(chunks, Tensor):
        return _sweep_items(list(chunks), combine, identity)
    first = identity.to(chunks).expand(chunks.shape[1:])[None]
    return torch.cat((first, *_sweep_tensors(chunks, combine))) if len(chunks) else first


def num_combines(chunks: int) -> int:
    """Return how many pairs `prefixes` combines for so many chunks."""
    # A tree over n chunks has a node for each pair merged: n less one for each complete subtree. Each prefix takes
    # one more, but those that are a single subtree.
    return 2 * chunks - chunks.bit_count() - chunks.bit_length()


# Both sweep up, from chunks to complete subtrees, and down: s_i is s_(i - 2^k) and the subtree of level k behind it,
# 2^k being the lowest bit of i. So a level needs the subtrees of its own and the prefixes of higher levels alone.


def _sweep_items(chunks: list[Any], combine: Callable[[Any, Any], Any], identity: Any) -> list[Any]:
    def each(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
        return [combine(a, b) for a, b in zip(left, right, strict=True)]

    lefts, trees = [], chunks
    while trees:
        lefts.append(trees[0::2])
        trees = each(trees[0 : len(trees) - 1 : 2], trees[1::2])
    known = [identity]  # the prefixes at the multiples of twice this level's width
    for left in reversed(lefts):
        new = [*left[:1], *each(known[1 : len(left)], left[1:])]
        both = [item for pair in zip(known, new, strict=False) for item in pair]
        known = both + known[len(new) :]
    return known


def _sweep_tensors(chunks: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Return s_1, s_2, ..., which laid one behind the other are all prefixes but the first, in one tensor or more.

    Pieces are split off and unbound, not sliced: the gradients of the pieces are then put together by one copy, where
    each slice would fill a tensor of zeros of its own.
    """
    levels: list[tuple[Tensor, list[Tensor]]] = []  # the first of a level's left subtrees, and those behind it
    trees = chunks
    while len(trees) > 1:
        pairs, odd = divmod(len(trees), 2)
        paired, *last = trees.split((2 * pairs, 1)) if odd else (trees,)
        left, right = paired.unflatten(0, (pairs, 2)).unbind(1)
        head, *behind = left.split((1, pairs - 1)) if pairs > 1 else (left,)
        levels.append((head, behind + last))
        trees = combine(left, right)
    known = [trees]  # the prefixes at the multiples of twice this level's width, but that at 0
    for head, behind in reversed(levels):
        if not behind:
            known = [head, *known]
            continue
        before = known[0] if len(known) == 1 else torch.cat(known)
        left = behind[0] if len(behind) == 1 else torch.cat(behind)
        before, *more = before.split((len(left), len(before) - len(left))) if len(before) > len(left) else (before,)
        new = combine(before, left)
        known = [head, torch.stack((before, new), dim=1).flatten(0, 1), *more]
    return known


@dataclass
class _Root(Generic[C]):
    """A complete subtree of 2^level chunks, and the left fold of it with every root before it."""

    level: int
    tree: C
    fold: C


class OnlineScan(Generic[C]):
    """Take chunks one by one and give the prefix so far, in the bracketing of `exclusive_scan`.

    After m chunks it keeps at most ceil(log2(m + 1)) roots with the fold up to each. A chunk costs at most two calls
    of `combine` on average: one merge for each subtree that it completes, and one fold.
    """

    def __init__(self, combine: Callable[[C, C], C], identity: C):
        self._combine = combine
        self._identity = identity
        self._roots: list[_Root[C]] = []

    @property
    def roots(self) -> list[C]:
        """The complete subtrees kept, the largest and earliest first."""
        return [root.tree for root in self._roots]

    def prefix(self) -> C:
        """Return the prefix of all chunks pushed so far; the identity before the first."""
        return self._roots[-1].fold if self._roots else self._identity

    def push(self, chunk: C) -> None:
        """Take the next chunk."""
        level, tree = 0, chunk
        while self._roots and self._roots[-1].level == level:
            tree = self._combine(self._roots.pop().tree, tree)
            level += 1
        fold = self._combine(self._roots[-1].fold, tree) if self._roots else tree
        self._roots.append(_Root(level, tree, fold))
