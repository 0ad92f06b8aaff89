"""Subtraction: differences in any base, `53-21=32<end>` reversed. Shapes: B problems, N digit places."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trivium.registry import UserError
from trivium.tasks.base import TASKS
from trivium.tasks.number_pairs import NumberPairConfig, NumberPairTask, carried, digit_counts, resized


@TASKS.register("subtraction")
@dataclass(frozen=True)
class SubtractionConfig(NumberPairConfig):
    """Differences of two numbers of min_length to max_length digits; a length counts digits."""

    signed: bool = False
    """Allow the second number to be the larger one: the difference then has a minus behind its most significant digit,
    so in front of the number or, reversed, at its end. Without, the larger number always comes first."""

    def make(self) -> "Subtraction":
        return Subtraction(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["SubtractionConfig"]:
        return [
            cls(),
            cls(signed=True, reversed=False, max_length=3),
            cls(base=16, zero_pad=True, min_length=2, max_length=6),
            cls(signed=True, zero_pad=True, base=2, max_length=11, train_examples=70),
        ]


class Subtraction(NumberPairTask):
    """Differences of natural numbers; a negative one is written only where the config is signed."""

    sign = "-"
    config: SubtractionConfig

    def __init__(self, config: SubtractionConfig):
        super().__init__(config)
        if config.zero_pad and not config.signed:
            self.answer_tokens = config.max_length
        self.max_length = self.prompt_room + config.max_length + 1 + config.signed

    def largest_shift(self) -> tuple[int, str]:
        """Return 1, or all digits of zero-filled numbers: elsewhere the highest digits say where a difference ends."""
        if self.config.zero_pad and self.config.reversed and not self.config.signed:
            digits = self.config.max_length
            return digits, f"the first digit of a difference needs that of the second number, of {digits} digits"
        return 1, "where a difference ends, or its sign, is known when both numbers have been read"

    def count(self, length: int) -> int:
        return super().count(length) // 2

    def numbers(self, states_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        first_BN, first_counts_B, second_BN, second_counts_B = super().numbers(states_B)
        if self.config.signed:
            return first_BN, first_counts_B, second_BN, second_counts_B
        # Two numbers drawn alike, the larger one first.
        swap_B = _less(first_BN, second_BN)
        swap_B1 = swap_B[:, None]
        return (
            np.where(swap_B1, second_BN, first_BN),
            np.where(swap_B, second_counts_B, first_counts_B),
            np.where(swap_B1, first_BN, second_BN),
            np.where(swap_B, first_counts_B, second_counts_B),
        )

    def results(self, first_BN: np.ndarray, second_BN: np.ndarray) -> list[np.ndarray]:
        negative_B = _less(first_BN, second_BN)
        columns_BN = np.where(negative_B[:, None], second_BN - first_BN, first_BN - second_BN)
        digits_BN = resized(carried(columns_BN, self.config.base), self.config.max_length)
        number = self.number(digits_BN, digit_counts(digits_BN), self.config.max_length)
        minus = self.symbol("-", len(digits_BN), negative_B)
        return [number, minus] if self.config.reversed else [minus, number]

    def result_text(self, first: int, second: int) -> str:
        if first < second and not self.config.signed:
            raise UserError(f"{first} - {second} is negative, and this task has no signed differences")
        text = self.number_text(abs(first - second), self.config.max_length)
        minus = "-" if first < second else ""
        return text + minus if self.config.reversed else minus + text


def _less(first_BN: np.ndarray, second_BN: np.ndarray) -> np.ndarray:
    """Say where the first number is less than the second: the most significant place that differs decides."""
    order_BN = np.sign(first_BN - second_BN)[:, ::-1]
    top_B1 = (order_BN != 0).argmax(axis=1)[:, None]
    return np.take_along_axis(order_BN, top_B1, axis=1)[:, 0] < 0
