"""Count what a causal window lets a query read: the number behind every FLOP figure."""

from functools import lru_cache
from math import prod


@lru_cache(maxsize=1024)
def allowed_pairs(length: int, *windows: int | None) -> int:
    """Return the sum over i < length of prod(min(i + 1, window)): (query, key, ...) tuples of one head.

    One window counts the pairs of attention, two the triples of 2-simplicial attention; None is no window.
    """
    return sum(prod(min(i, length if w is None else w) for w in windows) for i in range(1, length + 1))
