"""Sorting: numbers in any order, and the same numbers from the smallest to the largest, `31,7,7=7,7,31<end>`.

Shapes: B problems, L numbers of the longest list, N digits of the longest number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import TASKS, Example
from trivium.tasks.counter_random import below_high, below_low, mix, words
from trivium.tasks.drawn import END, Drawn, DrawnConfig, DrawnTask, drawn_lengths
from trivium.tasks.number_pairs import EMPTY, packed

MOST_DIGITS = 15  # numbers that an int64 holds, with room to spare


@TASKS.register("sorting")
@dataclass(frozen=True)
class SortingConfig(DrawnConfig):
    """Lists of natural numbers; a length counts the numbers of a list."""

    min_length: int = 2
    """Numbers of the shortest list."""
    max_length: int = 6
    """Numbers of the longest list."""
    max_digits: int = 2
    """Digits of the longest number; the digit count is uniform from 1, then the value."""
    descending: bool = False
    """Sort from the largest to the smallest."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.max_digits <= MOST_DIGITS:
            raise UserError(f"max_digits: expected 1 to {MOST_DIGITS}, got {self.max_digits}")

    def make(self) -> "Sorting":
        return Sorting(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["SortingConfig"]:
        return [
            cls(),
            cls(min_length=1, max_length=9, max_digits=1, descending=True),
            cls(min_length=3, max_length=3, max_digits=12, train_examples=40),
        ]


class Sorting(DrawnTask):
    """Lists are written with commas. Two orders of the same numbers are one problem, for splits and distinctness."""

    config: SortingConfig

    def __init__(self, config: SortingConfig):
        self.config = config
        digits = tuple("0123456789")
        self.alphabet = Alphabet((*digits, ",", "=", END), digits, end=END, pad=END)
        self.prompt_room = config.max_length * (config.max_digits + 1)
        self.max_length = 2 * self.prompt_room

    def count(self, length: int) -> int:
        # Orders are not counted apart: at least this many lists differ in their numbers.
        values = 10**self.config.max_digits
        return max(values // length, 1) ** min(length, values)

    def propose(self, states_B: np.ndarray) -> Drawn:
        config = self.config
        words_WB = words(states_B, 0, 1 + config.max_length * (1 + config.max_digits))
        lengths_B = drawn_lengths(words_WB[0], config.min_length, config.max_length)
        values_BL = self._values(words_WB[1:])
        inside_BL = np.arange(config.max_length) < lengths_B[:, None]
        # Lists end at their length: what is sorted behind it must come last in both orders.
        keys_BL = np.where(inside_BL, -values_BL if config.descending else values_BL, np.iinfo(np.int64).max)
        sorted_BL = np.sort(keys_BL, axis=1) * (-1 if config.descending else 1)
        prompts_BP, prompt_lengths_B = self._write(values_BL, lengths_B, self.alphabet.id_of("="))
        answers_BA, answer_lengths_B = self._write(sorted_BL, lengths_B, EMPTY)
        return Drawn(prompts_BP, prompt_lengths_B, answers_BA, answer_lengths_B)

    def _values(self, words_WB: np.ndarray) -> np.ndarray:
        """Return the values (B, L) of numbers whose digit count is uniform, and then they in their count."""
        most, digits = self.config.max_length, self.config.max_digits
        words_LNB = words_WB.reshape(most, 1 + digits, -1)
        counts_LB = drawn_lengths(words_LNB[:, 0], 1, digits)
        values_LB = np.zeros_like(counts_LB)
        for place in reversed(range(digits)):
            leading_LB = below_low(words_LNB[:, 1 + place], 9).astype(np.int64) + 1
            digit_LB = below_high(words_LNB[:, 1 + place], 10).astype(np.int64)
            top_LB = (place == counts_LB - 1) & (counts_LB > 1)
            values_LB = values_LB * 10 + np.where(place < counts_LB, np.where(top_LB, leading_LB, digit_LB), 0)
        return values_LB.T

    def _write(self, values_BL: np.ndarray, lengths_B: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens, lengths) of lists with commas between their numbers and the token `last` behind them."""
        rows, most = values_BL.shape
        width = self.config.max_digits
        powers_N = 10 ** np.arange(width - 1, -1, -1)
        inside_BL1 = (np.arange(most) < lengths_B[:, None])[:, :, None]
        written_BLN = (values_BL[:, :, None] >= powers_N) | (powers_N == 1)
        slots_BLN = np.full((rows, most, width + 1), EMPTY, dtype=np.int64)
        slots_BLN[:, :, :width] = np.where(written_BLN & inside_BL1, values_BL[:, :, None] // powers_N % 10, EMPTY)
        end_BL = np.arange(most) == (lengths_B - 1)[:, None]
        slots_BLN[:, :, width] = np.where(end_BL, last, np.where(inside_BL1[:, :, 0], self.alphabet.id_of(","), EMPTY))
        return packed([slots_BLN.reshape(rows, -1)], self.prompt_room)

    def hashes(self, problems: Drawn) -> np.ndarray:
        """Return hashes that do not depend on the order of the numbers."""
        # The value of each number stands where it ends, one above itself so that zeros count.
        hashes_B = problems.lengths_B.astype(np.uint64)
        values_B = np.zeros(len(hashes_B), dtype=np.uint64)
        ten, one, none = np.uint64(10), np.uint64(1), np.uint64(0)
        for place in range(problems.prompts_BP.shape[1]):
            tokens_B = problems.prompts_BP[:, place].astype(np.uint64)
            inside_B = place < problems.lengths_B
            digit_B = inside_B & (tokens_B < ten)
            hashes_B += np.where(inside_B & ~digit_B, mix(values_B + one), none)
            values_B = np.where(digit_B, values_B * ten + tokens_B, none)
        return mix(hashes_B)

    def _numbers(self, text: str) -> list[int]:
        parts = text.split(",")
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise UserError(f"expected numbers and =, such as 31,7,7=; got {text!r}")
        return [int(part) for part in parts]

    def solve(self, prompt: list[int]) -> list[int]:
        text = self.alphabet.decode(prompt)
        if not text.endswith("="):
            raise UserError(f"expected numbers and =, such as 31,7,7=; got {text!r}")
        ordered = sorted(self._numbers(text[:-1]), reverse=self.config.descending)
        return self.alphabet.encode(",".join(map(str, ordered)))

    def parse(self, expression: str) -> Example:
        numbers = self._numbers(expression.replace(" ", "").removesuffix("="))
        return self.example_of(self.alphabet.encode(",".join(map(str, numbers)) + "="))

    def canonical(self, example: Example) -> tuple[int, ...]:
        return tuple(sorted(self._numbers(example.prompt.removesuffix("="))))

    def tags(self, prompt: list[int]) -> dict[str, int | str]:
        numbers = self._numbers(self.alphabet.decode(prompt)[:-1])
        return {"length": len(numbers), "repeated": "yes" if len(set(numbers)) < len(numbers) else "no"}
