"""How sure a number is: intervals for rates and for means over seeds, from the standard library alone."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of the rate `successes` / `n`; (0, 1) when nothing was tried.

    Source: E. B. Wilson, JASA 22 (1927) 209. Raises ValueError for counts or a confidence that cannot be.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the exact bound is 0 or 1, which rounding would miss by 1e-17.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def rate(successes: int, n: int, confidence: float = 0.95) -> dict[str, Any]:
    """Return {"rate", "low", "high", "successes", "n"} with Wilson's interval; the rate is None when n is 0."""
    low, high = wilson(successes, n, confidence)
    return {"rate": successes / n if n else None, "low": low, "high": high, "successes": successes, "n": n}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Return {"both", "first_only", "second_only", "neither", "p"} of two verdicts on each of the same problems.

    `p` is the two-sided probability, under equal rates, of discordant pairs as uneven as these: exact, by the binomial
    distribution of 1/2. Source: Q. McNemar, Psychometrika 12 (1947) 153. Raises ValueError for unequal numbers.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} verdicts beside {len(second)}: expected two for each problem")
    pairs = Counter(zip(map(bool, first), map(bool, second), strict=True))
    only_first, only_second = pairs[True, False], pairs[False, True]
    n = only_first + only_second
    tail = sum(math.comb(n, count) for count in range(min(only_first, only_second) + 1))
    return {
        "both": pairs[True, True],
        "first_only": only_first,
        "second_only": only_second,
        "neither": pairs[False, False],
        "p": min(1.0, 2 * tail / 2**n),
    }


def errors_of(errors: int, n: int, confidence: float = 0.95) -> dict[str, Any]:
    """Return {"errors", "n", "upper"}: with `confidence` the rate of errors is at most "upper" (None when n is 0).

    The bound is Clopper and Pearson's, one-sided and exact: 3.0e-6 for none in a million. Source: Biometrika 26 (1934)
    404. Raises ValueError for counts or a confidence that cannot be.
    """
    _check_confidence(confidence)
    if not 0 <= errors <= n:
        raise ValueError(f"{errors} errors of {n}: expected 0 <= errors <= n")
    if errors == n:
        return {"errors": errors, "n": n, "upper": 1.0 if n else None}
    low, high = errors / n, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if _at_most(errors, n, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return {"errors": errors, "n": n, "upper": high}


def _at_most(count: int, n: int, rate: float) -> float:
    """Return the chance of `count` or fewer of `n` at a `rate` above `count` / `n`, where terms fall towards fewer."""
    if rate >= 1:
        return 0.0
    choices = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
    term = math.exp(choices + count * math.log(rate) + (n - count) * math.log1p(-rate))
    total, least = 0.0, term * 1e-17
    for k in range(count, -1, -1):
        total += term
        term *= k * (1 - rate) / ((n - k + 1) * rate)
        if term < least:
            break
    return total


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """Return (mean, low, high) of values that differ by seed, by Student's t; low and high are None for one value.

    The interval is that of the mean: how far off it may be, not how far the values spread.
    Raises ValueError when `values` is empty.
    """
    _check_confidence(confidence)
    if not values:
        raise ValueError("the mean of no values was asked for")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = student_t(len(values) - 1, confidence) * math.sqrt(variance / len(values))
    return mean, mean - half, mean + half


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """Return t such that |T| <= t with probability `confidence`, for T of `freedom` (>= 1) degrees of freedom.

    Source: Abramowitz and Stegun 26.7.3-4, a finite sum for whole degrees of freedom, solved by bisection.
    """
    _check_confidence(confidence)
    if freedom < 1:
        raise ValueError(f"freedom is {freedom}: expected at least 1")
    low, high = 0.0, math.pi / 2  # the angle atan(t / sqrt(freedom)), in which the probability is smooth
    for _ in range(100):
        angle = (low + high) / 2
        if _probability_within(angle, freedom) < confidence:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _probability_within(angle: float, freedom: int) -> float:
    """Return P(|T| <= sqrt(freedom) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine * cosine
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected a number between 0 and 1")
