"""What subtraction and multiplication share: two drawn numbers, written with a sign between them, as digit arrays.

Shapes: B problems, N digit places, P tokens of the longest prompt, S slots of a row before the empty ones are taken
out. Place 0 is the least significant; digits and not values are stored, so that numbers may have hundreds of digits.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trivium.registry import UserError
from trivium.tasks.addition_formats import DIGITS, digits_of, number_of
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import Example
from trivium.tasks.counter_random import below_high, below_low, mix, words
from trivium.tasks.drawn import END, Drawn, DrawnConfig, DrawnTask, drawn_lengths

EMPTY = -1


@dataclass(frozen=True)
class NumberPairConfig(DrawnConfig):
    """Two numbers of min_length to max_length digits each; a length counts digits."""

    written_by: ClassVar[tuple[str, ...]] = ("reversed", "zero_pad")

    max_length: int = 4
    """Digits of the longest number."""
    base: int = 10
    """Base of the numbers, 2 to 36; the digits are 0-9 and A-Z."""
    reversed: bool = True
    """Write every number least significant digit first."""
    zero_pad: bool = False
    """Zero-fill each number to max_length, and every result to as many digits as any can need."""

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.base <= 36:
            raise UserError(f"base: expected 2 to 36, got {self.base}")

    @property
    def second_lengths(self) -> tuple[int, int]:
        """The fewest and the most digits of the second number."""
        return self.min_length, self.max_length


class NumberPairTask(DrawnTask):
    """Problems such as `21*43=`. Subclasses set `sign` and `max_length` and give `results` and `result_text`."""

    sign: ClassVar[str]

    def __init__(self, config: NumberPairConfig, extra_symbols: tuple[str, ...] = ()):
        self.config = config
        self.least_first = config.reversed
        self.closing = (self.sign,)
        digits = tuple(DIGITS[: config.base])
        self.alphabet = Alphabet((*digits, self.sign, "=", END, *extra_symbols), digits, end=END, pad=END)
        self.prompt_room = config.max_length + config.second_lengths[1] + 2

    @abstractmethod
    def results(self, first_BN: np.ndarray, second_BN: np.ndarray) -> list[np.ndarray]:
        """Return what follows the prompt (without the end symbol) as slots (B, S) of token ids, EMPTY for none."""

    @abstractmethod
    def result_text(self, first: int, second: int) -> str:
        """Return the same as text, found from integers; UserError where the task has no such problem."""

    def count(self, length: int) -> int:
        second = min(self.config.second_lengths[0], length)
        return (self.config.base - 1) ** 2 * self.config.base ** (length + second - 2)

    def numbers(self, states_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draw both numbers of each problem: (first_BN, digit counts, second_BN, digit counts)."""
        config = self.config
        places = config.max_length
        words_WB = words(states_B, 0, 2 + places + config.second_lengths[1])
        first = draw_digits(words_WB[: 1 + places], config.min_length, places, config.base)
        fewest, most = config.second_lengths
        return *first, *draw_digits(words_WB[1 + places :], fewest, most, config.base)

    def propose(self, states_B: np.ndarray) -> Drawn:
        first_BN, first_counts_B, second_BN, second_counts_B = self.numbers(states_B)
        rows = len(states_B)
        prompts_BP, lengths_B = packed(
            [
                self.number(first_BN, first_counts_B, self.config.max_length),
                self.symbol(self.sign, rows),
                self.number(second_BN, second_counts_B, self.config.second_lengths[1]),
                self.symbol("=", rows),
            ],
            self.prompt_room,
        )
        answers = self.results(first_BN, second_BN)
        answers_BA, answer_lengths_B = packed(answers, sum(slots.shape[1] for slots in answers))
        return Drawn(prompts_BP, lengths_B, answers_BA, answer_lengths_B)

    def symbol(self, name: str, rows: int, used_B: np.ndarray | None = None) -> np.ndarray:
        """Return one column of slots that hold a symbol, where `used_B`."""
        slots_B1 = np.full((rows, 1), self.alphabet.id_of(name), dtype=np.int64)
        return slots_B1 if used_B is None else np.where(used_B[:, None], slots_B1, EMPTY)

    def number(self, digits_BN: np.ndarray, counts_B: np.ndarray, width: int) -> np.ndarray:
        """Return the slots of numbers: their digits in the order that the task writes, `width` of them if it pads."""
        counts_B = np.full_like(counts_B, width) if self.config.zero_pad else counts_B
        digits_BN = resized(digits_BN, width)
        slots_BN = np.where(np.arange(width) < counts_B[:, None], digits_BN, EMPTY)
        return slots_BN if self.config.reversed else slots_BN[:, ::-1]

    def number_text(self, number: int, width: int) -> str:
        """Return one number as the task writes it; `width` digits or more if it pads."""
        text = "".join(DIGITS[digit] for digit in digits_of(number, self.config.base))
        text = text.ljust(width, "0") if self.config.zero_pad else text
        return text if self.config.reversed else text[::-1]

    def number_of_text(self, text: str) -> int:
        """Return the number that the task writes as `text`; ValueError if that is none."""
        digits = [DIGITS[: self.config.base].index(character) for character in text]
        if not digits:
            raise ValueError("no digits")
        return number_of(digits if self.config.reversed else digits[::-1], self.config.base)

    def operands_of(self, prompt: str) -> tuple[int, int]:
        """Return both numbers of a prompt as the task writes it; UserError when it is none."""
        first, sign, rest = prompt.partition(self.sign)
        try:
            if not sign or not rest.endswith("="):
                raise ValueError(prompt)
            return self.number_of_text(first), self.number_of_text(rest[:-1])
        except ValueError:
            raise UserError(f"expected two numbers, such as {self.prompt_text(12, 3)}; got {prompt!r}") from None

    def prompt_text(self, first: int, second: int) -> str:
        """Return the prompt that poses a problem."""
        widths = self.config.max_length, self.config.second_lengths[1]
        return f"{self.number_text(first, widths[0])}{self.sign}{self.number_text(second, widths[1])}="

    def render(self, first: int, second: int) -> str:
        """Return the whole text of one problem, such as `21*3=63<end>` for 12 times 3."""
        return self.prompt_text(first, second) + self.result_text(first, second) + END

    def solve(self, prompt: list[int]) -> list[int]:
        return self.alphabet.encode(self.result_text(*self.operands_of(self.alphabet.decode(prompt))))

    def parse(self, expression: str) -> Example:
        """Read a problem in normal notation, most significant digit first, such as `12*34` or `12*34=`."""
        first, sign, second = expression.replace(" ", "").upper().removesuffix("=").partition(self.sign)
        digits = DIGITS[: self.config.base]
        if not sign or not first or not second or set(first + second) - set(digits):
            raise UserError(f"{expression!r}: write two numbers in base {self.config.base}, such as 12{self.sign}3")
        numbers = [
            number_of([digits.index(digit) for digit in reversed(text)], len(digits)) for text in (first, second)
        ]
        return self.example_of(self.alphabet.encode(self.prompt_text(numbers[0], numbers[1])))

    def readable(self, text: str) -> str:
        """Return `text` with each number most significant digit first, as a person writes it."""
        if not self.config.reversed:
            return text
        parts, number = [], ""
        for character in f"{text}\0":
            if character in self.alphabet.digits:
                number = character + number
            else:
                parts += [number, character]
                number = ""
        return "".join(parts)[:-1]

    def hashes(self, problems: Drawn) -> np.ndarray:
        return self.pair_hashes(*self._number_hashes(problems))

    def pair_hashes(self, first_B: np.ndarray, second_B: np.ndarray) -> np.ndarray:
        """Return the hash of each pair from those of its numbers; their order counts unless a task says otherwise."""
        return mix(first_B + mix(second_B))

    def _number_hashes(self, problems: Drawn) -> tuple[np.ndarray, np.ndarray]:
        """Return hashes of both numbers that depend on their values alone, not on order or zero-filling."""
        prompts_BP = problems.prompts_BP
        place_P = np.arange(prompts_BP.shape[1])
        sign_B1 = (prompts_BP == self.alphabet.id_of(self.sign)).argmax(axis=1)[:, None]
        end_B1 = problems.lengths_B[:, None] - 1
        in_first_BP, in_second_BP = place_P < sign_B1, (place_P > sign_B1) & (place_P < end_B1)
        if self.config.reversed:
            significance_BP = np.where(in_first_BP, place_P, place_P - sign_B1 - 1)
        else:
            significance_BP = np.where(in_first_BP, sign_B1, end_B1) - 1 - place_P
        mixed_BP = mix(prompts_BP.astype(np.uint64) + mix(significance_BP.astype(np.uint64) + np.uint64(1)))
        mixed_BP *= prompts_BP > 0
        first_B, second_B = (
            mix((mixed_BP * inside_BP).sum(axis=1, dtype=np.uint64)) for inside_BP in (in_first_BP, in_second_BP)
        )
        return first_B, second_B

    def tags(self, prompt: list[int]) -> dict[str, int | str]:
        first, second = self.operands_of(self.alphabet.decode(prompt))
        base = self.config.base
        return {"digits": len(digits_of(first, base)), "second_digits": len(digits_of(second, base))}


def draw_digits(words_WB: np.ndarray, shortest: int, longest: int, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (digits_BN, digit counts) of numbers whose count is uniform and then their value: 1 + longest words."""
    counts_B = drawn_lengths(words_WB[0], shortest, longest)
    digits_BN = below_high(words_WB[1:], base).T.astype(np.int64)
    rows_B, top_B = np.arange(len(counts_B)), counts_B - 1
    leading_B = below_low(words_WB[1:], base - 1).T.astype(np.int64)[rows_B, top_B] + 1
    digits_BN *= np.arange(longest) < counts_B[:, None]
    # Only a number of one digit may begin with 0.
    digits_BN[rows_B, top_B] = np.where(counts_B > 1, leading_B, digits_BN[rows_B, top_B])
    return digits_BN, counts_B


def carried(columns_BN: np.ndarray, base: int) -> np.ndarray:
    """Return digits (B, N) of the numbers whose columns, least first, may exceed the base or be negative."""
    digits_BN, carry_B = np.empty_like(columns_BN), np.zeros(len(columns_BN), dtype=np.int64)
    for place in range(columns_BN.shape[1]):
        carry_B, digits_BN[:, place] = np.divmod(columns_BN[:, place] + carry_B, base)
    return digits_BN


def digit_counts(digits_BN: np.ndarray) -> np.ndarray:
    """Return how many digits each number needs; 0 needs one."""
    return np.maximum(((digits_BN > 0) * np.arange(1, digits_BN.shape[1] + 1)).max(axis=1, initial=0), 1)


def resized(digits_BN: np.ndarray, width: int) -> np.ndarray:
    """Return numbers with `width` places; those cut off are zeros."""
    kept_BN = digits_BN[:, :width]
    if kept_BN.shape[1] == width:
        return kept_BN
    resized_BW = np.zeros((len(kept_BN), width), dtype=kept_BN.dtype)  # np.pad takes five times as long
    resized_BW[:, : kept_BN.shape[1]] = kept_BN
    return resized_BW


def packed(slots: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens (B, width), lengths_B): the used slots of each row, moved together; 0 lies behind them."""
    slots_BS = np.concatenate(slots, axis=1)
    used_BS = slots_BS != EMPTY
    lengths_B = used_BS.sum(axis=1)
    tokens_BP = np.zeros((len(slots_BS), width), dtype=np.int64)
    tokens_BP[np.arange(width) < lengths_B[:, None]] = slots_BS[used_BS]
    return tokens_BP, lengths_B
