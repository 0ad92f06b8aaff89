"""Sums as arrays: digit matrices of operands, their columns, and the tokens of whole batches.

Shapes: B problems, K operands, N digit places, M answer places, S slots of a row before the empty ones are taken out.
Place 0 is the least significant. Digits and not values are stored, so that numbers may have hundreds of digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trivium.tasks.addition_formats import Notation, number_of
from trivium.tasks.answers import THINK, THINK_END
from trivium.tasks.base import ANSWER, CHAIN, PAD, PROMPT, Batch

EMPTY = -1


@dataclass(frozen=True)
class Problems:
    """Operands of B sums. Digits above an operand's count are 0."""

    base: int
    digits_NKB: np.ndarray  # uint8
    counts_KB: np.ndarray  # int16

    def rows(self, rows: np.ndarray) -> "Problems":
        """Return the problems at `rows`."""
        return Problems(self.base, self.digits_NKB.take(rows, axis=2), self.counts_KB.take(rows, axis=1))

    def operands(self, row: int) -> list[int]:
        """Return the operands of one problem as Python integers."""
        return [number_of(digits.tolist(), self.base) for digits in self.digits_NKB[:, :, row].T]

    @cached_property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """The digit sums with the carry that came in, and the carries out, of each column: (N, B) int16 each."""
        places, _, rows = self.digits_NKB.shape
        sums_NB = self.digits_NKB.sum(axis=1, dtype=np.int16)
        carries_NB = np.empty((places, rows), dtype=np.int16)
        for place in range(places):
            if place:
                sums_NB[place] += carries_NB[place - 1]
            np.floor_divide(sums_NB[place], self.base, out=carries_NB[place])
        return sums_NB, carries_NB

    @cached_property
    def widths(self) -> np.ndarray:
        """Digits of each problem's longest operand."""
        return self.counts_KB.max(axis=0)

    def carries(self) -> np.ndarray:
        """Return in how many columns of the operands there is a carry out (B,)."""
        _, carries_NB = self.columns
        place_N1 = np.arange(len(carries_NB), dtype=np.int16)[:, None]
        return ((carries_NB > 0) & (place_N1 < self.widths)).sum(axis=0)

    def longest_chains(self) -> np.ndarray:
        """Return the longest run of consecutive columns of the operands with a carry out."""
        _, carries_NB = self.columns
        run_B = np.zeros(carries_NB.shape[1], dtype=np.int16)
        longest_B = np.zeros_like(run_B)
        for place, carries_B in enumerate(carries_NB):
            run_B = np.where((carries_B > 0) & (place < self.widths), run_B + np.int16(1), np.int16(0))
            np.maximum(longest_B, run_B, out=longest_B)
        return longest_B


def joined(parts: Sequence[Problems]) -> Problems:
    """Return the problems of all `parts`, of which there is one at least, one after the other."""
    digits, counts = [part.digits_NKB for part in parts], [part.counts_KB for part in parts]
    return Problems(parts[0].base, np.concatenate(digits, axis=2), np.concatenate(counts, axis=1))


def answer_digits(problems: Problems, places: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum's digits (M, B) int8, M = `places`, and how many of them it needs (B,)."""
    sums_NB, carries_NB = problems.columns
    width, rows = sums_NB.shape
    digits_MB = np.zeros((places, rows), dtype=np.int8)
    digits_MB[:width] = sums_NB - carries_NB * np.int16(problems.base)
    carry_B = carries_NB[-1]
    for place in range(width, places):
        digits_MB[place] = carry_B % problems.base
        carry_B = carry_B // problems.base
    counts_B = np.ones(rows, dtype=np.int16)
    for place in range(1, places):
        counts_B[digits_MB[place] > 0] = place + 1
    return digits_MB, counts_B


class Encoder:
    """Writes Problems as the Batch that collating their texts would give.

    Every row is laid out in slots, one for each token that any problem may need at that point; slots that a problem
    does not use hold EMPTY and are taken out at the end. Digit d has token id d in every addition alphabet.
    """

    def __init__(self, notation: Notation, max_digits: int):
        self.notation = notation
        self.places = notation.answer_width(max_digits)
        self.ids = {symbol: index for index, symbol in enumerate(notation.alphabet.symbols)}

    def _symbol(self, symbol: str, rows: int, present_B: np.ndarray | None = None) -> np.ndarray:
        slot = np.full((1, rows), self.ids[symbol], dtype=np.int8)
        if present_B is not None:
            slot[0, ~present_B] = EMPTY
        return slot

    def _answer_counts(self, problems: Problems, counts_B: np.ndarray) -> np.ndarray:
        """Return how many digits each answer is written with, of which it needs `counts_B`."""
        if not self.notation.aligned:
            return counts_B
        widths = np.array([self.notation.answer_width(width) for width in range(len(problems.digits_NKB) + 1)])
        return widths[problems.widths]

    def _number(self, digits_NB: np.ndarray, counts_B: np.ndarray, least_first: bool) -> np.ndarray:
        slots = digits_NB.astype(np.int8)
        if not self.notation.width:
            np.putmask(slots, np.arange(len(slots), dtype=np.int16)[:, None] >= counts_B, EMPTY)
        return slots if least_first else slots[::-1]

    def _operands(self, problems: Problems, least_first: bool) -> list[np.ndarray]:
        rows = problems.counts_KB.shape[1]
        slots = []
        for k, counts_B in enumerate(problems.counts_KB):
            counts_B = problems.widths if self.notation.aligned else counts_B
            slots += [self._symbol("+", rows)] if k else []
            slots.append(self._number(problems.digits_NKB[:, k], counts_B, least_first))
        return slots

    def _prompt(self, problems: Problems) -> list[np.ndarray]:
        rows = problems.counts_KB.shape[1]
        slots = self._operands(problems, self.notation.least_first)
        if self.notation.format == "delimited":
            slots.insert(0, self._symbol("+", rows))
        return [*slots, self._symbol(self.notation.finish, rows)]

    def _small_number(self, values_NB: np.ndarray, present_NB: np.ndarray, largest: int) -> list[np.ndarray]:
        """Return one (N, B) slot array for each digit of numbers up to `largest`, most significant first."""
        base, slots, power = self.notation.base, [], 1
        while power <= largest:
            used = present_NB if power == 1 else present_NB & (values_NB >= power)
            slots.append(np.where(used, values_NB // power % base, EMPTY).astype(np.int8))
            power *= base
        return slots[::-1]

    def _column_chain(self, problems: Problems) -> list[np.ndarray]:
        places, operands, rows = problems.digits_NKB.shape
        base, notation = self.notation.base, self.notation
        sums_NB, carries_NB = problems.columns
        carried_NB = np.zeros_like(carries_NB)
        carried_NB[1:] = carries_NB[:-1]
        widths_B = np.full(rows, places) if notation.width else problems.widths
        present_NB = (np.arange(places)[:, None] < widths_B) & (widths_B > 1)
        with_carry_NB = present_NB & (carried_NB > 0)

        def symbol(name: str, used_NB: np.ndarray) -> np.ndarray:
            return np.where(used_NB, np.int8(self.ids[name]), np.int8(EMPTY))

        term: list[np.ndarray] = []
        for k in range(operands):
            term += [symbol("+", present_NB)] if k else []
            term.append(np.where(present_NB, problems.digits_NKB[:, k].astype(np.int8), np.int8(EMPTY)))
        term.append(symbol("+", with_carry_NB))
        term += self._small_number(carried_NB, with_carry_NB, operands - 1)
        term.append(symbol("=", present_NB))
        term += self._small_number(sums_NB, present_NB, operands * base - 1)
        separator_NB = symbol(notation.separator, present_NB)
        separator_NB[np.maximum(widths_B, 1) - 1, np.arange(rows)] = EMPTY
        terms = np.stack([*term, separator_NB], axis=1).reshape(-1, rows)
        chained_B = widths_B > 1
        return [self._symbol(THINK, rows, chained_B), terms, self._symbol(THINK_END, rows, chained_B)]

    def _chain(self, problems: Problems, answer_MB: np.ndarray, counts_B: np.ndarray) -> list[np.ndarray]:
        if self.notation.format == "column":
            return self._column_chain(problems)
        if self.notation.format == "reversed_chain":
            rows = len(counts_B)
            equals, sums = self._symbol("=", rows), self._number(answer_MB, counts_B, least_first=True)
            written = self._operands(problems, least_first=True)
            return [self._symbol(THINK, rows), *written, equals, sums, self._symbol(THINK_END, rows)]
        return []

    def encode(self, problems: Problems) -> Batch:
        """Return the batch of `problems`."""
        alphabet = self.notation.alphabet
        answer_MB, counts_B = answer_digits(problems, self.places)
        counts_B = self._answer_counts(problems, counts_B)
        prompt = self._prompt(problems)
        chain = self._chain(problems, answer_MB, counts_B)
        answer = [
            self._number(answer_MB, counts_B, self.notation.least_first),
            self._symbol(alphabet.end, len(counts_B)),
        ]
        slots_SB = np.concatenate([*prompt, *chain, *answer])
        used_SB = slots_SB >= 0
        prompt_end = sum(map(len, prompt))
        chain_end = prompt_end + sum(map(len, chain))
        prompt_lengths_B = used_SB[:prompt_end].sum(axis=0)
        answer_starts_B = prompt_lengths_B + used_SB[prompt_end:chain_end].sum(axis=0)
        lengths_B = answer_starts_B + used_SB[chain_end:].sum(axis=0) - 1
        longest = int(lengths_B.max(initial=-1)) + 1

        # Small types until the end: fresh memory for large temporaries costs more than what is computed in it.
        places_T = np.arange(longest, dtype=np.int32)
        prompts_B1, answers_B1, ends_B1 = (
            bound_B[:, None].astype(np.int32) for bound_B in (prompt_lengths_B, answer_starts_B, lengths_B)
        )
        written_BT = np.full((len(lengths_B), longest), alphabet.pad_id, dtype=np.int8)
        # Both masks walk row by row, so the k-th used slot of a row lands in its k-th place.
        written_BT[places_T <= ends_B1] = np.ascontiguousarray(slots_SB.T)[np.ascontiguousarray(used_SB.T)]
        tokens_BT, targets_BT = written_BT[:, :-1].astype(np.int64), written_BT[:, 1:].astype(np.int64)
        if alphabet.pad != alphabet.end:
            tokens_BT[places_T[:-1] == ends_B1] = alphabet.pad_id
        regions_BT = np.full(targets_BT.shape, ANSWER, dtype=np.uint8)
        if chain:
            regions_BT[places_T[1:] < answers_B1] = CHAIN
        regions_BT[places_T[1:] < prompts_B1] = PROMPT
        regions_BT[places_T[1:] > ends_B1] = PAD
        weights_BT = ((regions_BT == ANSWER) | (regions_BT == CHAIN)).astype(np.float32)
        return Batch(tokens_BT, targets_BT, weights_BT, regions_BT, lengths_B, prompt_lengths_B)
