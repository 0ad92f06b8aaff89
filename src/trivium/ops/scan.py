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
    if isinstance(chunks, Tensor):
        first = identity.to(chunks).expand(chunks.shape[1:])[None]
        return _sweep(chunks, first, combine, _split_tensor, _interleave_tensors)

    def each(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
        return [combine(a, b) for a, b in zip(left, right, strict=True)]

    return _sweep(list(chunks), [identity], each, _split_list, _interleave_lists)


def num_combines(chunks: int) -> int:
    """Return how many pairs `prefixes` combines for so many chunks."""
    # A tree over n chunks has a node for each pair merged: n less one for each complete subtree. Each prefix takes
    # one more, but those that are a single subtree.
    return 2 * chunks - chunks.bit_count() - chunks.bit_length()


def _sweep(
    chunks: Any,
    first: Any,
    combine: Callable[[Any, Any], Any],
    split: Callable[[Any], tuple[Any, Any]],
    interleave: Callable[[Any, Any], Any],
) -> Any:
    """Sweep up, from chunks to complete subtrees, and down: s_i is s_(i - 2^k) and the subtree of level k behind it,
    2^k being the lowest bit of i. So a level needs the subtrees of its own and the prefixes of higher levels alone.
    """
    if len(chunks) == 0:
        return first
    lefts, trees = [], chunks
    while len(trees) > 1:
        left, right = split(trees)
        lefts.append(left)
        trees = combine(left[: len(right)], right)
    lefts.append(trees)
    known = first  # the prefixes at the multiples of twice this level's width
    for left in reversed(lefts):
        new = left[:1]
        if len(left) > 1:
            combined = combine(known[1 : len(left)], left[1:])
            new = torch.cat((new, combined)) if isinstance(combined, Tensor) else [*new, *combined]
        known = interleave(known, new)
    return known


def _split_tensor(trees: Tensor) -> tuple[Tensor, Tensor]:
    """Return the trees at even and at odd places. Backward, unbind is one copy, where strided slices fill zeros."""
    pairs = len(trees) // 2
    left, right = trees[: 2 * pairs].unflatten(0, (pairs, 2)).unbind(1)
    return (torch.cat((left, trees[-1:])) if len(trees) % 2 else left), right


def _split_list(trees: list[Any]) -> tuple[list[Any], list[Any]]:
    return trees[0::2], trees[1::2]


def _interleave_tensors(even: Tensor, odd: Tensor) -> Tensor:
    both = torch.stack((even[: len(odd)], odd), dim=1).flatten(0, 1)
    return torch.cat((both, even[len(odd) :])) if len(even) > len(odd) else both


def _interleave_lists(even: list[Any], odd: list[Any]) -> list[Any]:
    both = [item for pair in zip(even, odd, strict=False) for item in pair]
    return both + even[len(odd) :]


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
