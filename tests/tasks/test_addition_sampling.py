"""Which sums are drawn: disjoint splits, exact distributions, and nothing searched forever."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks import addition_sampling
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.addition_arrays import Problems
from trivium.tasks.addition_carries import CarrySampler
from trivium.tasks.addition_formats import columns_of, digits_of
from trivium.tasks.addition_sampling import Space, draw, in_split, problem_hashes, stream_states
from trivium.tasks.base import SPLITS
from trivium.tasks.counter_random import below_high, below_low, key, mix, unit, words


def problems_of(sums: list[tuple[int, ...]], base: int, places: int) -> Problems:
    digits = np.zeros((places, len(sums[0]), len(sums)), dtype=np.uint8)
    counts = np.zeros((len(sums[0]), len(sums)), dtype=np.int16)
    for b, operands in enumerate(sums):
        for k, operand in enumerate(operands):
            written = digits_of(operand, base)
            digits[: len(written), k, b] = written
            counts[k, b] = len(written)
    return Problems(base, digits, counts)


def longest_chain(operands: tuple[int, ...], base: int) -> int:
    carries = "".join("c" if total >= base else " " for _, _, total in columns_of(operands, base))
    return max(map(len, carries.split()), default=0)


def test_a_problem_keeps_its_split_when_its_operands_are_swapped_or_the_task_is_wider():
    sums = [(a, b) for a in range(40) for b in range(40)]
    swapped = [(b, a) for a, b in sums]
    narrow, wide = problem_hashes(problems_of(sums, 10, 2)), problem_hashes(problems_of(swapped, 10, 300))
    assert (narrow == wide).all()
    assert len(set(narrow.tolist())) == 40 * 41 // 2


def test_long_numbers_that_differ_in_any_place_differ_in_hash():
    base = 10**60
    sums = [(base + 10**place, base) for place in range(60)] + [(base, base), (base - 1, base)]
    assert len(set(problem_hashes(problems_of(sums, 10, 61)).tolist())) == len(sums)


def test_the_split_of_a_problem_depends_on_neither_seed_nor_format():
    test = {
        AdditionConfig(format=format, seed=seed, max_digits=2).build().canonical(example)
        for format, seed in (("plain", 0), ("column", 1), ("delimited", 2))
        for task in [AdditionConfig(format=format, seed=seed, max_digits=2).build()]
        for example in task.examples("test", np.arange(300))
    }
    task = AdditionConfig(max_digits=2, seed=7).build()
    assert not test & {task.canonical(example) for example in task.examples("train", np.arange(3000))}


@pytest.mark.parametrize("split", SPLITS)
def test_every_digit_occurs_at_every_place_of_operands_and_sum_in_every_split(split):
    # A linear hash of the pair once put every sum with units digit 0 into the test split.
    task = AdditionConfig(min_digits=3, max_digits=3, format="plain").build()
    seen: dict[tuple[str, int], set[int]] = {}
    for example in task.examples(split, np.arange(2000)):
        a, b = task.operands_of(example)
        for name, number in (("a", a), ("b", b), ("sum", a + b)):
            for place, digit in enumerate(digits_of(number, 10)[:3]):
                seen.setdefault((name, place), set()).add(digit)
    for (name, place), digits in seen.items():
        lowest = 1 if place == 2 and name != "sum" else 0
        assert digits == set(range(lowest, 10)), (name, place)


def test_each_split_gets_its_share_of_the_problems():
    space = Space(10, 2, 1, 3, False, 0.1, 0.2)
    sums = [(a, b) for a in range(0, 1000, 7) for b in range(a, 1000, 5)]
    hashes = problem_hashes(problems_of(sums, 10, 3))
    shares = {split: in_split(hashes, split, space).mean() for split in SPLITS}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.01)
    assert sum(in_split(hashes, split, space).astype(int) for split in SPLITS).tolist() == [1] * len(sums)


def test_digit_counts_and_digits_are_uniform():
    # Over all splits: rejection would bend the counts of short numbers, which are few.
    space = Space(10, 2, 1, 4, False, 0.05, 0.05)
    problems = addition_sampling.draw_uniform(stream_states(0, "train", np.arange(40_000)), space)
    counts = Counter(problems.counts_KB[0].tolist())
    assert {count: share / 40_000 for count, share in counts.items()} == pytest.approx(
        dict.fromkeys(range(1, 5), 0.25), abs=0.01
    )
    for count in range(1, 5):
        for place in range(count):
            digits = problems.digits_NKB[place, 1, problems.counts_KB[1] == count]
            lowest = 1 if place == count - 1 and count > 1 else 0
            shares = np.bincount(digits, minlength=10)[lowest:] / len(digits)
            assert shares == pytest.approx(np.full(10 - lowest, 1 / (10 - lowest)), abs=0.015)
        assert not problems.digits_NKB[count:, 1, problems.counts_KB[1] == count].any()


@pytest.mark.parametrize("stratify", ["uniform", "carry"])
def test_an_index_gives_the_same_problem_alone_and_in_any_company(stratify):
    space = AdditionConfig(stratify=stratify, max_digits=5).space
    for split in SPLITS:
        indices = np.array([5, 0, 2**41 + 3, 5, 77])
        together, hashes = draw(space, 3, split, indices)
        for row, index in enumerate(indices):
            alone, own = draw(space, 3, split, np.array([index]))
            assert alone.operands(0) == together.operands(row)
            assert own[0] == hashes[row]
        assert in_split(hashes, split, space).all()


def test_seeds_splits_and_indices_give_different_problems():
    drawn = [
        tuple(draw(AdditionConfig(max_digits=12).space, seed, split, np.arange(3))[0].operands(row))
        for seed in (0, 1)
        for split in SPLITS
        for row in range(3)
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(("base", "operands", "low", "high"), [(10, 2, 1, 2), (3, 3, 1, 2), (2, 2, 3, 3), (2, 4, 1, 2)])
def test_the_chances_of_chains_are_those_of_counting_every_problem(base, operands, low, high):
    sampler = CarrySampler(base, operands, low, high)
    lowest = base ** (low - 1) if low > 1 else 0
    chances = np.zeros(high + 1)
    for problem in itertools.product(range(lowest, base**high), repeat=operands):
        chance = 1.0
        for operand in problem:
            count = len(digits_of(operand, base))
            chance /= (high - low + 1) * (base if count == 1 else (base - 1) * base ** (count - 1))
        chances[longest_chain(problem, base)] += chance
    assert sampler.chances == pytest.approx(chances)
    assert sampler.feasible.tolist() == np.flatnonzero(chances).tolist()


@pytest.mark.parametrize(("base", "operands"), [(10, 2), (3, 3), (2, 5)])
def test_within_a_stratum_problems_have_the_distribution_of_uniform_sampling(base, operands):
    high = 2
    sampler = CarrySampler(base, operands, 1, high)
    states = stream_states(1, "train", np.arange(30_000))
    for chain in sampler.feasible:
        drawn = sampler.draw(states, np.full(len(states), chain))
        assert (drawn.longest_chains() == chain).all()
        expected: dict[tuple[int, ...], float] = {}
        for counts in itertools.product(range(1, high + 1), repeat=operands):
            # The distribution of digit counts within the stratum, by counting.
            ranges = [range(base ** (count - 1) if count > 1 else 0, base**count) for count in counts]
            hits = sum(longest_chain(problem, base) == chain for problem in itertools.product(*ranges))
            expected[counts] = hits / np.prod([len(numbers) for numbers in ranges])
        total = sum(expected.values())
        found = Counter(map(tuple, drawn.counts_KB.T.tolist()))
        for counts, weight in expected.items():
            assert found[counts] / len(states) == pytest.approx(weight / total, abs=0.015)


def test_problems_of_one_stratum_are_equally_likely():
    sampler = CarrySampler(10, 2, 2, 2)
    drawn = sampler.draw(stream_states(0, "train", np.arange(60_000)), np.full(60_000, 2))
    problems = Counter(tuple(drawn.operands(row)) for row in range(60_000))
    everything = [(a, b) for a in range(10, 100) for b in range(10, 100) if longest_chain((a, b), 10) == 2]
    assert set(problems) == set(everything)
    expected = 60_000 / len(everything)
    chi_squared = sum((problems[problem] - expected) ** 2 / expected for problem in everything)
    degrees = len(everything) - 1
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(
    "config",
    [
        AdditionConfig(stratify="carry", max_digits=20),
        AdditionConfig(stratify="carry", min_digits=30, max_digits=30, base=2),
        AdditionConfig(stratify="carry", max_digits=6, operands=5, base=36),
    ],
)
def test_the_longest_chain_is_uniform_over_the_feasible_lengths(config):
    task = config.build()
    for split in ("train", "test"):
        chains = Counter(example.tags["longest_carry_chain"] for example in task.examples(split, np.arange(1000)))
        feasible = config.space.carries.feasible.tolist()
        assert sorted(chains) == feasible
        share = 1000 / len(feasible)
        assert all(abs(count - share) < 5 * share**0.5 for count in chains.values())


def test_a_binary_number_of_fixed_length_cannot_avoid_its_leading_carry():
    assert 0 not in CarrySampler(2, 2, 5, 5).feasible


def test_a_split_that_is_next_to_empty_is_refused_and_not_searched_forever(monkeypatch):
    monkeypatch.setattr(addition_sampling, "ATTEMPTS", 2000)
    nowhere = Space(10, 2, 1, 3, False, 0.05, 1e-12)
    started = time.monotonic()
    with pytest.raises(UserError, match="the test split holds too few problems"):
        draw(nowhere, 0, "test", np.arange(2))
    assert time.monotonic() - started < 10


def test_splitmix_gives_its_published_words():
    # The first words of splitmix64 seeded with 1234567, from the reference implementation.
    assert words(np.array([1234567], dtype=np.uint64), 0, 2)[:, 0].tolist() == [
        6457827717110365317,
        3203168211198807973,
    ]


def test_random_words_are_spread_over_their_bounds():
    states = mix(np.arange(50_000, dtype=np.uint64))
    drawn = words(states, 0, 1)[0]
    for below in (below_high, below_low):
        assert np.bincount(below(drawn, 7).astype(int), minlength=7) == pytest.approx(50_000 / 7, rel=0.06)
    assert unit(drawn).min() >= 0
    assert unit(np.array([2**64 - 1], dtype=np.uint64))[0] < 1
    assert key(1, 2) != key(2, 1)
