"""Sums drawn by their longest carry chain: the longest run of consecutive columns with a carry out.

The columns of a sum, from the right, are a Markov chain whose state is the operands that still have digits, the carry
in, the length of the current run, and whether the wanted length was reached. `CarrySampler` computes backwards the
probability that a state still ends with the wanted longest run, and draws forwards from it: no draw is thrown away,
and within a stratum sums have the distribution of uniform sampling.

Shapes: B problems, K operands, N digit places, C wanted lengths, A operands with a digit in a column, R carries.
"""

from functools import cached_property, lru_cache
from math import comb

import numpy as np

from trivium.registry import UserError
from trivium.tasks.addition_arrays import Problems
from trivium.tasks.counter_random import unit, words

LARGEST_TABLE = 2**24


class CarrySampler:
    """Draws sums of `operands` numbers, digit counts uniform in min_digits..max_digits, with a given longest chain.

    Raises UserError when a table of it would hold more than 2^24 numbers (more than about 100 digits for two operands,
    or 17 operands in base 10).
    """

    def __init__(self, base: int, operands: int, min_digits: int, max_digits: int):
        self.base, self.operands = base, operands
        self.min_digits, self.max_digits = min_digits, max_digits
        runs = max_digits + 1
        ahead = max_digits * runs * (operands + 1) * operands * runs * 2
        ladders = (operands + 1) ** 2 * operands**2 * (operands * (base - 1) + 1)
        if max(ahead, ladders) > LARGEST_TABLE:
            fewer = "digits" if ahead > ladders else "operands"
            raise UserError(
                f"stratify: carry-stratified sums of {operands} numbers of up to {max_digits} digits in base {base} "
                f"need too large a table; use fewer {fewer}, or stratify: uniform"
            )

    def _sum_weights(self, lowest: int) -> np.ndarray:
        """Return weights[f, e, s]: the number of ways in which f free digits and e leading ones sum to s.

        A leading digit is at least `lowest`.
        """
        top = self.operands * (self.base - 1) + 1
        weights = np.zeros((self.operands + 1, self.operands + 1, top))
        weights[0, 0, 0] = 1.0
        for free in range(self.operands + 1):
            for leading in range(self.operands + 1 - free):
                if free:
                    before, digits = weights[free - 1, leading], range(self.base)
                elif leading:
                    before, digits = weights[free, leading - 1], range(lowest, self.base)
                else:
                    continue
                for digit in digits:
                    weights[free, leading, digit:] += before[: top - digit]
        return weights

    @cached_property
    def _weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Sum weights of the first column, whose leading digits may be 0, and of the others."""
        return self._sum_weights(0), self._sum_weights(1)

    def _stops(self, place: int) -> float:
        """Return the chance that a number with a digit at `place` has no further one."""
        return 1.0 / (self.max_digits - place) if place + 1 >= self.min_digits else 0.0

    @cached_property
    def _sum_chances(self) -> tuple[np.ndarray, np.ndarray]:
        """Chance [a, e, x, y] of carry y out given a digits (e leading) and carry x in: first and other columns."""
        tables = []
        for lowest, weights in zip((0, 1), self._weights, strict=True):
            table = np.zeros((self.operands + 1, self.operands + 1, self.operands, self.operands))
            for a in range(self.operands + 1):
                for e in range(a + 1):
                    ways = weights[a - e, e]
                    for x in range(self.operands):
                        carries = (np.arange(len(ways)) + x) // self.base
                        for y in range(self.operands):
                            table[a, e, x, y] = ways[carries == y].sum()
                    total = float(self.base) ** (a - e) * float(self.base - lowest) ** e
                    table[a, e] /= total
            tables.append(table)
        return tables[0], tables[1]

    @cached_property
    def _transitions(self) -> list[np.ndarray]:
        """Every place's transitions, which each draw needs again."""
        return [self._transitions_at(place) for place in range(self.max_digits)]

    def _transitions_at(self, place: int) -> np.ndarray:
        """Return the chance [a, e, x, y] of e numbers ending and carry y out given a digits and carry x in."""
        stop = self._stops(place)
        chances = self._sum_chances[0 if place == 0 else 1].copy()
        for a in range(self.operands + 1):
            for e in range(a + 1):
                chances[a, e] *= comb(a, e) * stop**e * (1.0 - stop) ** (a - e)
        return chances

    @cached_property
    def _ahead(self) -> list[np.ndarray]:
        """Chance, by place, that the state before it ends with the wanted chain: [wanted, a, carry, run, reached].

        A run longer than wanted has chance 0; wanted 0 counts as reached from the start.
        """
        n, k = self.max_digits, self.operands
        runs = np.arange(n + 1)
        allowed_CL = runs <= runs[:, None]
        ended = np.zeros((n + 1, k, n + 1, 2))
        ended[..., 1] = allowed_CL[:, None]
        table = np.zeros((n + 1, k + 1, k, n + 1, 2))
        table[:, 0] = ended
        tables = [table]
        for place in range(n - 1, -1, -1):
            after, before, chances = tables[0], np.zeros_like(table), self._transitions[place]
            before[:, 0] = ended
            grown = self._grow(after)
            for a in range(1, k + 1):
                for e in range(a + 1):
                    for x in range(k):
                        for y in range(k):
                            if chances[a, e, x, y]:
                                next_CLF = grown[:, a - e, y] if y else after[:, a - e, 0, :1, :]
                                before[:, a, x] += chances[a, e, x, y] * next_CLF
            before *= allowed_CL[:, None, None, :, None]
            tables.insert(0, before)
        return tables

    @staticmethod
    def _grow(table: np.ndarray) -> np.ndarray:
        """Return what `table` holds after one more carrying column: run + 1, and reached when that is the length."""
        grown = np.zeros_like(table)
        grown[..., :-1, :] = table[..., 1:, :]
        for wanted in range(1, len(table)):
            grown[wanted, :, :, wanted - 1, 0] = table[wanted, :, :, wanted, 1]
        return grown

    @cached_property
    def chances(self) -> np.ndarray:
        """Probability of each longest chain 0..max_digits under uniform sampling."""
        start = self._ahead[0][:, self.operands, 0, 0, :]
        return np.concatenate([start[:1, 1], start[1:, 0]])

    @cached_property
    def feasible(self) -> np.ndarray:
        """Lengths of the longest chain that some sum has, ascending."""
        return np.flatnonzero(self.chances > 0)

    def choose_chains(self, states_B: np.ndarray) -> np.ndarray:
        """Draw the longest chain (B,) of each problem, uniformly over the feasible ones."""
        return self.feasible[(unit(words(states_B, 0, 1)[0]) * len(self.feasible)).astype(np.int64)]

    @cached_property
    def _sum_ladders(self) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative sum weights [a, e, x, y, s] over the digit sums s that turn carry x into y."""
        ladders = []
        for weights in self._weights:
            top = weights.shape[-1]
            table = np.zeros((self.operands + 1, self.operands + 1, self.operands, self.operands, top))
            for a in range(self.operands + 1):
                for e in range(a + 1):
                    for x in range(self.operands):
                        carries = (np.arange(top) + x) // self.base
                        for y in range(self.operands):
                            table[a, e, x, y] = np.where(carries == y, weights[a - e, e], 0.0).cumsum()
            ladders.append(table)
        return ladders[0], ladders[1]

    @cached_property
    def _digit_ladders(self) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative weights [f, e, s, d] of the next digit d when f free and e leading digits must sum to s.

        The leading digits are drawn first.
        """
        ladders = []
        for lowest, weights in zip((0, 1), self._weights, strict=True):
            top = weights.shape[-1]
            table = np.zeros((self.operands + 1, self.operands + 1, top, self.base))
            for free in range(self.operands + 1):
                for leading in range(self.operands + 1 - free):
                    if free + leading == 0:
                        continue
                    rest = weights[free, leading - 1] if leading else weights[free - 1, 0]
                    for digit in range(lowest if leading else 0, self.base):
                        table[free, leading, digit:, digit] = rest[: top - digit]
            ladders.append(table.cumsum(axis=-1))
        return ladders[0], ladders[1]

    def _options(self, place: int, states: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the cumulative chances (S, O) of what a column can do: O pairs of numbers that end and a carry out.

        `states` are arrays (S,): wanted chain, numbers with digits, carry in, run so far, wanted chain reached.
        """
        chains_S1, alive_S1, carry_S1, run_S1, reached_S1 = (each[:, None] for each in states)
        ends_O, outs_O = self._outcomes
        runs_SO = np.where(outs_O > 0, run_S1 + 1, 0)
        hits_SO = np.where(runs_SO == chains_S1, 1, reached_S1)
        remain_SO = np.maximum(alive_S1 - ends_O, 0)
        chances_SO = self._transitions[place][alive_S1, ends_O, carry_S1, outs_O]
        after = self._ahead[place + 1]
        chances_SO *= after[chains_S1, remain_SO, outs_O, np.minimum(runs_SO, self.max_digits), hits_SO]
        finished_S = states[1] == 0  # such rows draw an empty column
        chances_SO[finished_S] = 0.0
        chances_SO[finished_S, 0] = 1.0
        return chances_SO.cumsum(axis=1)

    @property
    def _outcomes(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers that end in a column, and the carry out of it, of each thing that a column can do."""
        return np.divmod(np.arange((self.operands + 1) * self.operands), self.operands)

    def _choose(self, place: int, states: tuple[np.ndarray, ...], unit_B: np.ndarray) -> np.ndarray:
        """Return what the column at `place` does in each row."""
        n, k = self.max_digits, self.operands
        shape = n + 1, k + 1, k, n + 1, 2
        if (count := int(np.prod(shape))) > len(unit_B):
            return pick(self._options(place, states), np.arange(len(unit_B)), unit_B)
        every = np.unravel_index(np.arange(count), shape)
        return pick(self._options(place, every), np.ravel_multi_index(states, shape), unit_B)

    def draw(self, states_B: np.ndarray, chains_B: np.ndarray) -> Problems:
        """Draw one problem from each random stream, with the longest carry chain that `chains_B` names."""
        k, n, rows = self.operands, self.max_digits, len(states_B)
        alive_B, carry_B, run_B = np.full(rows, k), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        reached_B = (chains_B == 0).astype(np.int64)
        digits_NKB = np.zeros((n, k, rows), dtype=np.uint8)
        counts_KB = np.zeros((k, rows), dtype=np.int16)
        ends, outs = self._outcomes
        for place in range(n):
            random = unit(words(states_B, place * (k + 2), k + 2))
            option_B = self._choose(place, (chains_B, alive_B, carry_B, run_B, reached_B), random[0])
            end_B, out_B = ends[option_B], outs[option_B]
            kind = 0 if place == 0 else 1
            left_B = _pick_at(self._sum_ladders[kind], (alive_B, end_B, carry_B, out_B), random[1])
            left_B[alive_B == 0] = 0
            free_B, leading_B = alive_B - end_B, end_B.copy()
            for slot in range(k - 1, -1, -1):
                drawing_B = slot < alive_B
                digit_B = _pick_at(self._digit_ladders[kind], (free_B, leading_B, left_B), random[2 + slot])
                digit_B[~drawing_B] = 0
                digits_NKB[place, slot] = digit_B
                left_B -= digit_B
                is_leading_B = drawing_B & (leading_B > 0)
                leading_B -= is_leading_B
                free_B -= drawing_B & ~is_leading_B
            counts_KB += np.arange(k)[:, None] < alive_B
            run_B = np.where(out_B > 0, run_B + 1, 0)
            reached_B = np.where(run_B == chains_B, 1, reached_B)
            alive_B, carry_B = alive_B - end_B, out_B
        # Numbers ended from the last slot down; a random order makes every operand alike.
        order_KB = words(states_B, n * (k + 2), k).argsort(axis=0)
        digits_NKB = np.take_along_axis(digits_NKB, order_KB[None], axis=1)
        return Problems(self.base, digits_NKB, np.take_along_axis(counts_KB, order_KB, axis=0))


@lru_cache(maxsize=8)
def carry_sampler(base: int, operands: int, min_digits: int, max_digits: int) -> CarrySampler:
    """Return a CarrySampler, the same one each time, because its table takes a while to compute."""
    return CarrySampler(base, operands, min_digits, max_digits)


def pick(ladders_SX: np.ndarray, rows_B: np.ndarray, unit_B: np.ndarray) -> np.ndarray:
    """Return the index that a number in [0, 1) falls on by the weights of `rows_B` so far; never one of weight 0."""
    wanted_B = unit_B * ladders_SX[:, -1].take(rows_B)
    # Column by column: numpy sums along a short axis slowly, and one column of a table stays in the cache.
    picked_B = np.zeros(len(unit_B), dtype=np.int64)
    for column_S in ladders_SX.T:
        picked_B += np.ascontiguousarray(column_S).take(rows_B) <= wanted_B
    return picked_B


def _pick_at(ladders: np.ndarray, index: tuple[np.ndarray, ...], unit_B: np.ndarray) -> np.ndarray:
    """Return what `pick` does by the weights at `index` of a table with the weights in its last axis."""
    rows_B = np.ravel_multi_index(index, ladders.shape[:-1])
    return pick(ladders.reshape(-1, ladders.shape[-1]), rows_B, unit_B)
