import math
import random

import pytest

from trivium.evaluate.statistics import errors_of, mean_interval, rate, student_t, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (1, 1, 0.2065, 1),
    ],
)
def test_wilson_gives_the_published_values(successes, n, low, high):
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3, for 81 of 263.
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_holds_its_confidence_on_average():
    generator = random.Random(0)
    n, covered = 40, 0
    for _ in range(2000):
        truth = generator.random()
        low, high = wilson(sum(generator.random() < truth for _ in range(n)), n)
        covered += low <= truth <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_wider_confidence_gives_a_wider_interval():
    low95, high95 = wilson(30, 100)
    low99, high99 = wilson(30, 100, confidence=0.99)
    assert low99 < low95 < 0.3 < high95 < high99


def test_a_rate_of_nothing_is_unknown_and_its_interval_is_everything():
    assert rate(0, 0) == {"rate": None, "low": 0.0, "high": 1.0, "successes": 0, "n": 0}
    assert rate(1, 4)["rate"] == 0.25


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (1, 0)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


@pytest.mark.parametrize(
    ("freedom", "confidence", "t"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (2, 0.99, 9.9248),
        (3, 0.95, 3.1824),
        (4, 0.90, 2.1318),
        (9, 0.95, 2.2622),
        (30, 0.95, 2.0423),
        (120, 0.95, 1.9799),
        (1001, 0.95, 1.96234),
    ],
)
def test_student_t_gives_the_table_values(freedom, confidence, t):
    assert student_t(freedom, confidence) == pytest.approx(t, abs=6e-5)


def test_the_interval_of_a_mean_is_that_of_student():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert low is not None
    assert high is not None
    assert (mean - low, high - mean) == pytest.approx((4.30265 / math.sqrt(3),) * 2, abs=1e-4)


def test_one_value_has_a_mean_and_no_interval():
    assert mean_interval([0.5]) == (0.5, None, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval([0.25] * 4) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_outside_0_to_1_is_refused(confidence):
    for call in (lambda: wilson(1, 2, confidence), lambda: mean_interval([1, 2], confidence)):
        with pytest.raises(ValueError, match="confidence"):
            call()


@pytest.mark.parametrize(
    ("errors", "n", "upper"),
    [(0, 1_000_000, 2.9957e-6), (0, 10, 0.258866), (1, 10, 0.394163), (5, 10, 0.777559), (10, 10, 1.0)],
)
def test_the_bound_of_rare_errors_is_the_exact_one(errors, n, upper):
    # 1 - 0.05^(1/n) without errors; the others are Clopper and Pearson's upper ends of a 90 % interval.
    found = errors_of(errors, n)
    assert (found["errors"], found["n"]) == (errors, n)
    assert found["upper"] == pytest.approx(upper, rel=1e-4)


def test_the_bound_of_many_errors_is_near_their_rate_and_of_nothing_unknown():
    assert 0.3 < errors_of(300_000, 1_000_000)["upper"] < 0.301
    assert errors_of(0, 0)["upper"] is None
    with pytest.raises(ValueError, match="3 errors of 2"):
        errors_of(3, 2)
