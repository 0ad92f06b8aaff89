"""Which sums are drawn: a pure function of (seed, split, index, attempt), taken when the sum lies in the split.

A sum belongs to the split that a mixing hash of its sorted operands falls in, whatever the format or the seed.
Shapes as in `addition_arrays`: B problems, K operands, N digit places.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

import numpy as np

from trivium.registry import UserError
from trivium.tasks.addition_arrays import Problems
from trivium.tasks.addition_carries import CarrySampler, carry_sampler
from trivium.tasks.base import SPLITS, Split
from trivium.tasks.counter_random import below_high, below_low, key, mix, words

ENUMERATED = 2**16  # spaces of at most so many ordered problems are counted exactly
ATTEMPTS = 2**17  # more than any split that `check_splits` lets pass needs
SMALLEST_FRACTION = 0.001
FULL_CALL = 4096  # problems drawn at once that keep numpy busy
MOST_TRIES = 256  # attempts of one index drawn at once
CANDIDATES = 2**21  # digits held at once while drawing
_PACKED = 2**62


@dataclass(frozen=True)
class Space:
    """The problems that can be drawn, and how: all that sampling needs to know of a config."""

    base: int
    operands: int
    min_digits: int
    max_digits: int
    stratified: bool
    validation_fraction: float
    test_fraction: float
    digits: tuple[int, ...] = ()

    @property
    def ranges(self) -> list[range]:
        """The values that each operand may have."""
        spans = [(count, count) for count in self.digits] or [(self.min_digits, self.max_digits)] * self.operands
        return [range(self.base ** (fewest - 1) if fewest > 1 else 0, self.base**most) for fewest, most in spans]

    @property
    def ordered_size(self) -> int:
        """The number of problems, different orders of the operands counted as different."""
        return prod(values.stop - values.start for values in self.ranges)

    def fraction(self, split: Split) -> float:
        """Return the share of all problems that belongs to `split`."""
        held_out = {"validation": self.validation_fraction, "test": self.test_fraction}
        return held_out[split] if split in held_out else 1.0 - sum(held_out.values())

    @property
    def carries(self) -> CarrySampler:
        return carry_sampler(self.base, self.operands, self.min_digits, self.max_digits)


@cache
def _group(base: int, limit: int) -> int:
    """Return how many digits make numbers of which there are at most `limit`."""
    group = 1
    while base ** (group + 1) <= limit:
        group += 1
    return group


def problem_hashes(problems: Problems) -> np.ndarray:
    """Return a uint64 hash (B,) of each problem that does not depend on the order of its operands."""
    digits_NKB, base = problems.digits_NKB, problems.base
    group = _group(base, _PACKED)
    hashes_KB: np.ndarray | None = None
    for start in range(0, len(digits_NKB), group):
        packed_KB = np.zeros(problems.counts_KB.shape, dtype=np.uint64)
        for digits_KB in digits_NKB[start : start + group][::-1]:
            packed_KB *= np.uint64(base)
            packed_KB += digits_KB
        if hashes_KB is None:
            hashes_KB = mix(packed_KB + np.uint64(base))
        else:
            # Groups of zeros must leave the hash alone: 7 is the same number in a task of 3 and of 300 digits.
            chained_KB = mix(hashes_KB + mix(packed_KB + np.uint64(start)))
            hashes_KB = np.where(packed_KB > 0, chained_KB, hashes_KB)
    assert hashes_KB is not None
    return mix(hashes_KB.sum(axis=0, dtype=np.uint64))


def in_split(hashes_B: np.ndarray, split: Split, space: Space) -> np.ndarray:
    """Return which hashes (B,) fall in `split`: the lowest go to test, the next to validation, the rest to train."""
    test = np.uint64(space.test_fraction * 2.0**64)
    held_out = np.uint64((space.test_fraction + space.validation_fraction) * 2.0**64)
    if split == "test":
        return hashes_B < test
    return hashes_B >= held_out if split == "train" else (hashes_B >= test) & (hashes_B < held_out)


@lru_cache(maxsize=64)
def _digit_table(base: int) -> np.ndarray:
    """Return the digits (least first) of every number that a 48-bit random word can be spread over evenly."""
    group = _group(base, 2**16)
    numbers = np.arange(base**group)
    return np.stack([numbers // base**place % base for place in range(group)]).astype(np.uint8)


def draw_uniform(states_B: np.ndarray, space: Space) -> Problems:
    """Draw one problem from each random stream: digit counts uniform, then values uniform in their count."""
    base, operands, places = space.base, space.operands, space.max_digits
    table = _digit_table(base)
    group, numbers = table.shape
    per_operand = 1 + -(-(places - 1) // group)
    words_WKB = words(states_B, 0, per_operand * operands).reshape(per_operand, operands, -1)
    counts_KB = below_high(words_WKB[0], places - space.min_digits + 1).astype(np.int16) + np.int16(space.min_digits)
    if space.digits:
        counts_KB[:] = np.array(space.digits, dtype=np.int16)[:, None]
    leading_KB = (below_low(words_WKB[0], base - 1) + np.uint64(1)).astype(np.uint8)
    digits_NKB = np.zeros((places, *counts_KB.shape), dtype=np.uint8)
    for word, start in enumerate(range(0, places - 1, group), start=1):
        drawn_KB = ((words_WKB[word] >> np.uint64(16)) * np.uint64(numbers)) >> np.uint64(48)
        for place in range(start, min(start + group, places - 1)):
            table[place - start].take(drawn_KB.view(np.int64), out=digits_NKB[place], mode="clip")
    last_KB = counts_KB - np.int16(1)
    for place in range(space.min_digits - 1, places):
        digits_NKB[place] *= place < last_KB
        digits_NKB[place] += leading_KB * (last_KB == place)
    if space.min_digits == 1:
        # A number of one digit may be 0.
        single_KB = last_KB == 0
        digits_NKB[0][single_KB] = below_low(words_WKB[0], base)[single_KB]
    return Problems(base, digits_NKB, counts_KB)


def stream_states(seed: int, split: Split, indices_B: np.ndarray) -> np.ndarray:
    """Return the uint64 state (B,) from which everything about the problems at `indices_B` is drawn."""
    return mix(key(seed, SPLITS.index(split)) + mix(indices_B.astype(np.uint64)))


def draw(space: Space, seed: int, split: Split, indices_B: np.ndarray) -> tuple[Problems, np.ndarray]:
    """Return the problems at `indices_B` of `split`, and their hashes (B,).

    Attempt t of an index is drawn from a stream of its own, and the first attempt that lies in the split is taken.
    Raises UserError when the split holds too few problems to find one.
    """
    rows = len(indices_B)
    states_B = stream_states(seed, split, np.asarray(indices_B))
    chains_B = space.carries.choose_chains(states_B) if space.stratified else None
    digits_NKB = np.zeros((space.max_digits, space.operands, rows), dtype=np.uint8)
    counts_KB = np.ones((space.operands, rows), dtype=np.int16)
    hashes_B = np.zeros(rows, dtype=np.uint64)
    most = max(1, CANDIDATES // (space.max_digits * space.operands))
    most_tries = min(int(1.2 / space.fraction(split)), MOST_TRIES)
    pending_B, attempt = np.arange(rows), 0
    while len(pending_B):
        if attempt >= ATTEMPTS:
            raise UserError(f"the {split} split holds too few problems: none in {attempt} attempts; widen the task")
        # Several attempts at once where few rows are left, as numpy's overhead is by the call. The result is the same.
        tries = min(max(1, FULL_CALL // len(pending_B)), most_tries)
        left = []
        for start in range(0, len(pending_B), max(1, most // tries)):
            rows_B = pending_B[start : start + max(1, most // tries)]
            attempts_A = np.arange(attempt, attempt + tries, dtype=np.uint64)
            states_BA = mix(states_B[rows_B, None] + (attempts_A + np.uint64(1)) * np.uint64(0xD1342543DE82EF95))
            if chains_B is None:
                drawn = draw_uniform(states_BA.ravel(), space)
            else:
                drawn = space.carries.draw(states_BA.ravel(), np.repeat(chains_B[rows_B], tries))
            hashes_BA = problem_hashes(drawn).reshape(-1, tries)
            taken_BA = in_split(hashes_BA, split, space)
            if tries == 1 and len(rows_B) == rows:
                # Everything is kept at once; later attempts write over the rows that are still pending.
                digits_NKB, counts_KB, hashes_B = drawn.digits_NKB, drawn.counts_KB, hashes_BA[:, 0]
                left.append(rows_B[~taken_BA[:, 0]])
                continue
            found_B = taken_BA.any(axis=1)
            first_B = np.arange(len(rows_B)) * tries + taken_BA.argmax(axis=1)
            into_B, from_B = rows_B[found_B], first_B[found_B]
            digits_NKB[:, :, into_B] = drawn.digits_NKB.take(from_B, axis=2)
            counts_KB[:, into_B] = drawn.counts_KB.take(from_B, axis=1)
            hashes_B[into_B] = hashes_BA.ravel()[from_B]
            left.append(rows_B[~found_B])
        pending_B, attempt = np.concatenate(left), attempt + tries
        most_tries = min(max(4, 2 * most_tries), MOST_TRIES)
    return Problems(space.base, digits_NKB, counts_KB), hashes_B


def problems_from(operands: np.ndarray, base: int, places: int) -> Problems:
    """Return the Problems of integer `operands` (B, K), each below base**places < 2^63."""
    powers_N = base ** np.arange(places)
    digits_NKB = (operands.T[None] // powers_N[:, None, None] % base).astype(np.uint8)
    counts_KB = np.maximum(1, (operands.T[None] >= powers_N[:, None, None]).sum(axis=0)).astype(np.int16)
    return Problems(base, digits_NKB, counts_KB)


def _enumerate(space: Space) -> tuple[Problems, np.ndarray]:
    """Return every ordered problem of a small space, and the probability (B,) with which one is drawn uniformly."""
    grids = np.meshgrid(*(np.arange(values.start, values.stop) for values in space.ranges), indexing="ij")
    problems = problems_from(np.stack([grid.ravel() for grid in grids], axis=1), space.base, space.max_digits)
    counts = problems.counts_KB.astype(np.float64)
    per_count = np.where(counts == 1, float(space.base), (space.base - 1.0) * space.base ** (counts - 1))
    choices = 1 if space.digits else space.max_digits - space.min_digits + 1
    return problems, (1.0 / (choices * per_count)).prod(axis=0)


@lru_cache(maxsize=256)
def check_splits(space: Space) -> None:
    """Raise UserError when a split, or a stratum of one, holds no problems or too few to be found by drawing.

    Small spaces are counted exactly. In a large one each split has its share of the problems to within a hair, and
    only strata need a look: as many problems are drawn from each as find its smallest split 20 times on average.
    """
    carries = space.carries if space.stratified else None  # refuses what it has no room for
    span = f"{space.operands} numbers of {space.min_digits} to {space.max_digits} digits in base {space.base}"
    if space.ordered_size <= ENUMERATED:
        problems, probabilities_B = _enumerate(space)
        hashes_B = problem_hashes(problems)
        chains_B = problems.longest_chains() if space.stratified else np.zeros(len(hashes_B), dtype=np.int16)
        for chain in np.unique(chains_B):
            stratum_B = chains_B == chain
            name = f" with a longest carry chain of {chain}" if space.stratified else ""
            for split in SPLITS:
                inside_B = stratum_B & in_split(hashes_B, split, space)
                number = len(np.unique(hashes_B[inside_B]))
                total = len(np.unique(hashes_B[stratum_B]))
                chance = probabilities_B[inside_B].sum() / probabilities_B[stratum_B].sum()
                if number == 0 or chance < 1e-4:
                    raise UserError(
                        f"the {split} split has {number} of the {total} sums of {span}{name}: too few to draw from; "
                        "use more digits or a larger fraction"
                    )
    elif carries is not None and space.ordered_size < 2**40:
        smallest = min(SPLITS, key=space.fraction)
        states_B = stream_states(0, "train", np.arange(int(20 / space.fraction(smallest)) + 1))
        for chain in carries.feasible:
            drawn = carries.draw(states_B, np.full(len(states_B), chain))
            hashes_B = problem_hashes(drawn)
            for split in SPLITS:
                if not in_split(hashes_B, split, space).any():
                    raise UserError(
                        f"the {split} split has next to no sums of {span} with a longest carry chain of {chain}; "
                        "use more digits or a larger fraction"
                    )
