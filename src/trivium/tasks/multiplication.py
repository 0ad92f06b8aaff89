"""Multiplication, with a chain of partial products or without: 12*34 reversed is `21*43=804<end>`, or with its chain

    21*43=<think>84+063(804)</think>804<end>

The chain lists, for each digit of the second number from the least significant, the first number times that digit at
its place (48 and 360 here), and behind every one but the first the sum so far in brackets (408). Without `last_sum`
the last of these sums is the answer alone: `<think>84+063</think>804`.
Shapes: B problems, N and M digit places of the numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trivium.config import UserError, knob
from trivium.tasks.addition_formats import digits_of
from trivium.tasks.answers import THINK, THINK_END, chain_regions, judge, strip_end
from trivium.tasks.base import TASKS, Example, Step, Verdict
from trivium.tasks.counter_random import mix
from trivium.tasks.drawn import Drawn
from trivium.tasks.number_pairs import EMPTY, NumberPairConfig, NumberPairTask, carried, digit_counts, resized


@TASKS.register("multiplication")
@dataclass(frozen=True)
class MultiplicationConfig(NumberPairConfig):
    """Products of two numbers, the first of min_length to max_length digits; a length counts digits."""

    written_by: ClassVar[tuple[str, ...]] = ("reversed", "zero_pad", "chain", "last_sum")

    second_length: int | None = None
    """Digits of the second number; null draws them as those of the first, from min_length to max_length."""
    chain: bool = False
    """Write the partial products and their running sums before the answer."""
    last_sum: bool = knob(True, affects_results="unless_default")
    """Write the last of these sums in the chain too, where the answer only repeats it."""

    def __post_init__(self):
        super().__post_init__()
        if self.second_length is not None and self.second_length < 1:
            raise UserError(f"second_length: expected 1 or more digits, or null, got {self.second_length}")

    @property
    def second_lengths(self) -> tuple[int, int]:
        if self.second_length is None:
            return self.min_length, self.max_length
        return self.second_length, self.second_length

    def of_pair(self, first: int, second: int) -> "MultiplicationConfig":
        """Return this task with products of a number of `first` and one of `second` digits."""
        return replace(self, min_length=first, max_length=first, second_length=second)

    def make(self) -> "Multiplication":
        return Multiplication(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["MultiplicationConfig"]:
        return [
            cls(max_length=3),
            cls(chain=True),
            cls(chain=True, min_length=2, max_length=5, second_length=1, reversed=False, base=7),
            cls(chain=True, zero_pad=True, min_length=4, max_length=4, train_examples=60, last_sum=False),
            cls(zero_pad=True, max_length=12, base=16, reversed=False),
        ]


class Multiplication(NumberPairTask):
    """Products of natural numbers. The two orders of a pair are one problem, for splits and for distinctness."""

    sign = "*"
    config: MultiplicationConfig

    def __init__(self, config: MultiplicationConfig):
        super().__init__(config, ("+", "(", ")", THINK, THINK_END) if config.chain else ())
        self.width = config.max_length + config.second_lengths[1]
        largest = config.base**config.max_length - 1, config.base ** config.second_lengths[1] - 1
        self.max_length = len(self.alphabet.encode(self.render(*largest)))
        if config.zero_pad and not config.chain:
            self.answer_tokens = self.width

    def largest_shift(self) -> tuple[int, str]:
        """Return the digits of the shortest second number: a product's first digit needs that number's first digit."""
        if self.config.chain or not self.config.reversed:
            return 1, "the second number has to be read before the rest is begun"
        digits = self.config.second_lengths[1 if self.config.zero_pad else 0]
        return digits, f"the first digit of a product needs that of the second number, of {digits} digits"

    def results(self, first_BN: np.ndarray, second_BN: np.ndarray) -> list[np.ndarray]:
        base, rows = self.config.base, len(first_BN)
        written_B = np.full(rows, second_BN.shape[1]) if self.config.zero_pad else digit_counts(second_BN)
        slots: list[np.ndarray] = []
        sums_BW = np.zeros((rows, self.width), dtype=np.int64)
        for place in range(second_BN.shape[1]):
            used_B = place < written_B
            partial_BW = np.zeros_like(sums_BW)
            partial_BW[:, place : place + first_BN.shape[1]] = first_BN * second_BN[:, place, None]
            partial_BW = carried(partial_BW, base)
            sums_BW = carried(sums_BW + partial_BW, base)
            if self.config.chain:
                summed_B = used_B & self._is_summed(place, written_B)
                slots += self._term(place, partial_BW, sums_BW, used_B, summed_B)
        product = self.number(sums_BW, digit_counts(sums_BW), self.width)
        if not self.config.chain:
            return [product]
        return [self.symbol(THINK, rows), *slots, self.symbol(THINK_END, rows), product]

    def _is_summed(self, place: int, places: Any) -> Any:
        """Say whether the sum so far follows the partial product at `place`, of so many."""
        return (place > 0) & (self.config.last_sum | (place + 1 < places))

    def _term(
        self, place: int, partial_BW: np.ndarray, sums_BW: np.ndarray, used_B: np.ndarray, summed_B: np.ndarray
    ) -> list[np.ndarray]:
        """Return the slots of one partial product and of the sum so far behind it."""
        width, rows = self.term_width(place), len(used_B)
        parts = []
        for digits_BW, written_B in ((partial_BW, used_B), (sums_BW, summed_B)):
            # A partial product of zero keeps the zeros of its place, as the others do.
            counts_B = np.maximum(digit_counts(digits_BW), place + 1 if digits_BW is partial_BW else 1)
            number_BN = self.number(resized(digits_BW, width), counts_B, width)
            parts.append(np.where(written_B[:, None], number_BN, EMPTY))
        if place == 0:
            return parts[:1]
        plus = self.symbol("+", rows, used_B)
        opened, closed = (self.symbol(name, rows, summed_B) for name in "()")
        return [plus, parts[0], opened, parts[1], closed]

    def term_width(self, place: int) -> int:
        """Return the most digits of the partial product at `place` of the second number, and of the sum up to it."""
        return self.config.max_length + 1 + place

    def _multiplier_digits(self, second: int) -> list[int]:
        """Return the digits of the second number that have a term in the chain, least significant first."""
        digits = digits_of(second, self.config.base)
        return digits + [0] * (self.config.second_lengths[1] - len(digits)) if self.config.zero_pad else digits

    def _chain_text(self, first: int, second: int) -> str:
        base, total, terms = self.config.base, 0, ""
        digits = self._multiplier_digits(second)
        for place, digit in enumerate(digits):
            partial = first * digit * base**place
            total += partial
            width = self.term_width(place)
            text = self.number_text(partial, width)
            if partial == 0 and not self.config.zero_pad:
                text = "0" * (place + 1)
            terms += f"+{text}" if place else text
            if self._is_summed(place, len(digits)):
                terms += f"({self.number_text(total, width)})"
        return THINK + terms + THINK_END

    def result_text(self, first: int, second: int) -> str:
        chain = self._chain_text(first, second) if self.config.chain else ""
        return chain + self.number_text(first * second, self.width)

    def chain_lengths(self, problems: Drawn) -> np.ndarray:
        answers_BA, _ = self.answer(problems)
        if not self.config.chain:
            return np.zeros(len(answers_BA), dtype=np.int64)
        return (answers_BA == self.alphabet.id_of(THINK_END)).argmax(axis=1) + 1

    def pair_hashes(self, first_B: np.ndarray, second_B: np.ndarray) -> np.ndarray:
        return mix(first_B + second_B)

    def canonical(self, example: Example) -> tuple[int, ...]:
        return tuple(sorted(self.operands_of(example.prompt)))

    def regions(self, example: Example) -> list[int]:
        return chain_regions(self.alphabet, example)

    def verify(self, example: Example, text: str) -> Verdict:
        """Decide whether the answer, behind the chain if there is one, is the product and nothing but it."""
        return judge(self.alphabet, example, text)

    def _terms(self, text: str) -> list[str]:
        _, opening, chain = text.partition(THINK)
        chain = strip_end(self.alphabet, chain.partition(THINK_END)[0])[0]
        return chain.split("+") if opening and self.config.chain and chain else []

    def steps(self, example: Example, text: str) -> list[Step]:
        """Return the terms of the chain in `text`.

        One is true when its partial product is, and its sum, if it has one, that of the sum before it, as written, and
        of it.
        """
        first, second = self.operands_of(example.prompt)
        digits = self._multiplier_digits(second)
        steps, before = [], 0
        for place, term in enumerate(self._terms(text)):
            partial, total = self._read_term(term, self._is_summed(place, len(digits)), before)
            true = False
            if partial is not None and total is not None and place < len(digits):
                true = partial == first * digits[place] * self.config.base**place and total == before + partial
            steps.append(Step(term, true))
            before = total if total is not None else before
        return steps

    def _read_term(self, term: str, summed: bool, before: int | None) -> tuple[int | None, int | None]:
        """Return (partial product, sum so far) of one term behind a sum of `before`; None for what cannot be read."""
        match = re.fullmatch(r"(\w+)\((\w+)\)" if summed else r"(\w+)", term)
        if match is None:
            return None, None
        try:
            numbers = [self.number_of_text(number) for number in match.groups()]
        except ValueError:
            return None, None
        if summed:
            return numbers[0], numbers[1]
        return numbers[0], None if before is None else before + numbers[0]

    def answer_from_steps(self, example: Example, text: str) -> str | None:
        """Return the last sum of a finished chain in `text`, written as an answer; None where there is none."""
        terms = self._terms(text)
        if not terms or THINK_END not in text:
            return None
        places = len(self._multiplier_digits(self.operands_of(example.prompt)[1]))
        total: int | None = 0
        for place, term in enumerate(terms):
            total = self._read_term(term, self._is_summed(place, places), total)[1]
        return None if total is None else self.number_text(total, self.width)

    def corrupt_step(self, example: Example, text: str, rng: np.random.Generator) -> str | None:
        """Return `text` with one digit of the chain's last number changed, so that another answer follows from it.

        Its most significant digit does not become 0. None when `text` has no finished chain.
        """
        digits = "".join(self.alphabet.digits)
        match = re.search(rf"([{digits}]+)(?=\)?{re.escape(THINK_END)})", text)
        if match is None or not self.config.chain or self.answer_from_steps(example, text) is None:
            return None
        place = match.start() + int(rng.integers(len(match.group())))
        top = match.end() - 1 if self.config.reversed else match.start()
        others = [digit for digit in digits if digit != text[place] and not (digit == "0" and place == top)]
        if not others:
            return None
        return text[:place] + others[int(rng.integers(len(others)))] + text[place + 1 :]
