"""Means over seeds with their intervals, and differences that are paired by seed."""

from collections.abc import Mapping, Sequence
from typing import Any

from trivium.evaluate.statistics import mean_interval


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return {"mean", "low", "high", "values"}: Student's t over seeds; nulls where there are too few of them."""
    if not values:
        return {"mean": None, "low": None, "high": None, "values": []}
    mean, low, high = mean_interval(values)
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


def difference_of(mine: Mapping[Any, float], theirs: Mapping[Any, float | None]) -> dict[str, Any]:
    """Return the interval of `mine` less `theirs` over the seeds that both have."""
    pairs = [(value, theirs[seed]) for seed, value in mine.items() if theirs.get(seed) is not None]
    return interval([value - other for value, other in pairs if other is not None])
