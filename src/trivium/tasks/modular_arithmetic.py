"""Sums, differences and products modulo a number, with or without brackets: (3-(4*2))+1=.

Without brackets a finite automaton computes them, with brackets only a stack does (arXiv 2207.02098, table 1).
Shapes: B problems, N numbers, P tokens of the longest prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import TASKS
from trivium.tasks.counter_random import below_high, below_low, words
from trivium.tasks.drawn import END, Drawn, DrawnConfig, DrawnTask, drawn_lengths, drawn_order

LARGEST_MODULUS = 1000
ALL_OPERATORS = "+-*"


@TASKS.register("modular_arithmetic")
@dataclass(frozen=True)
class ModularArithmeticConfig(DrawnConfig):
    """Expressions of numbers below a modulus, and their value; a length counts the numbers."""

    max_length: int = 6
    """Numbers of the longest expression."""
    modulus: int = 5
    """Modulus; the numbers are those below it, one token each."""
    operators: str = ALL_OPERATORS
    """Operators that expressions are made of: some of + - *."""
    brackets: bool = False
    """Bracket every operation but the last, in a random order; without, * binds before + and -."""

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.modulus <= LARGEST_MODULUS:
            raise UserError(f"modulus: expected 2 to {LARGEST_MODULUS}, got {self.modulus}")
        given = self.operators
        if not given or set(given) - set(ALL_OPERATORS) or len(set(given)) != len(given):
            raise UserError(f"operators: expected some of {ALL_OPERATORS}, each once, got {given!r}")

    def make(self) -> "ModularArithmetic":
        return ModularArithmetic(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["ModularArithmeticConfig"]:
        return [
            cls(max_length=5),
            cls(max_length=7, brackets=True),
            cls(min_length=3, max_length=5, modulus=23, operators="-*", brackets=True, train_examples=60),
        ]


class ModularArithmetic(DrawnTask):
    """Expressions end with `=`. Numbers of a modulus above 10 are single symbols such as <12>."""

    config: ModularArithmeticConfig

    def __init__(self, config: ModularArithmeticConfig):
        self.config = config
        numbers = tuple(str(i) if config.modulus <= 10 else f"<{i}>" for i in range(config.modulus))
        self.alphabet = Alphabet((*numbers, *ALL_OPERATORS, "(", ")", "=", END), numbers, end=END, pad=END)
        self._operator_ids = np.array([self.alphabet.id_of(operator) for operator in config.operators])
        self.prompt_room = _tokens(config.max_length, config.brackets)
        self.max_length = self.prompt_room + 2

    def count(self, length: int) -> int:
        return self.config.modulus**length * len(self.config.operators) ** (length - 1)

    def propose(self, states_B: np.ndarray) -> Drawn:
        config, most = self.config, self.config.max_length
        words_WB = words(states_B, 0, 1 + 2 * most)
        lengths_B = drawn_lengths(words_WB[0], config.min_length, config.max_length)
        numbers_BN = below_high(words_WB[1 : 1 + most], config.modulus).T.astype(np.int64)
        operators_BN = self._operator_ids[below_low(words_WB[1 : 1 + most], len(config.operators)).T.astype(np.int64)]
        opens_BN, closes_BN = np.zeros_like(numbers_BN), np.zeros_like(numbers_BN)
        if config.brackets:
            ready_BN = np.arange(most) < (lengths_B - 1)[:, None]
            order_BN = drawn_order(np.ascontiguousarray(words_WB[1 + most :].T), ready_BN)
            values_B = self._reduce(numbers_BN, operators_BN, order_BN, lengths_B, opens_BN, closes_BN)
        else:
            values_B = self._evaluate(numbers_BN, operators_BN, lengths_B)
        prompts_BP = self._write(numbers_BN, operators_BN, opens_BN, closes_BN, lengths_B)
        tokens_B = (prompts_BP != -1).sum(axis=1)
        prompts_BP[prompts_BP == -1] = 0
        return Drawn(prompts_BP, tokens_B, values_B[:, None], np.ones_like(lengths_B))

    def _evaluate(self, numbers_BN: np.ndarray, operators_BN: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Return the values (B,) of expressions without brackets: a sum so far, and the product that is going on."""
        sums_B, product_B = np.zeros_like(lengths_B), numbers_BN[:, 0].copy()
        for place in range(1, numbers_BN.shape[1]):
            inside_B = place < lengths_B
            operator_B, number_B = operators_BN[:, place - 1], numbers_BN[:, place]
            times_B = operator_B == self.alphabet.id_of("*")
            minus_B = operator_B == self.alphabet.id_of("-")
            sums_B = np.where(inside_B & ~times_B, sums_B + product_B, sums_B) % self.config.modulus
            next_B = np.where(times_B, product_B * number_B, np.where(minus_B, -number_B, number_B))
            product_B = np.where(inside_B, next_B, product_B) % self.config.modulus
        return (sums_B + product_B) % self.config.modulus

    def _reduce(
        self,
        numbers_BN: np.ndarray,
        operators_BN: np.ndarray,
        order_BN: np.ndarray,
        lengths_B: np.ndarray,
        opens_BN: np.ndarray,
        closes_BN: np.ndarray,
    ) -> np.ndarray:
        """Return the values (B,) when operators apply in the order given, and count the brackets that say so.

        `opens_BN` and `closes_BN` get the brackets directly before and behind each number.
        """
        rows_B = np.arange(len(lengths_B))
        values_BN = numbers_BN.copy()  # the value of a bracket stands where it begins
        first_BN = np.tile(np.arange(numbers_BN.shape[1]), (len(lengths_B), 1))  # of the bracket that ends here
        last_BN = first_BN.copy()  # of the bracket that begins here
        for turn in range(numbers_BN.shape[1] - 1):
            rows = rows_B[turn < lengths_B - 1]
            operator = order_BN[rows, turn]
            left, middle = first_BN[rows, operator], operator + 1
            right = last_BN[rows, middle]
            one, other, sign = values_BN[rows, left], values_BN[rows, middle], operators_BN[rows, operator]
            found = np.where(sign == self.alphabet.id_of("-"), one - other, one + other)
            found = np.where(sign == self.alphabet.id_of("*"), one * other, found)
            values_BN[rows, left] = found % self.config.modulus
            first_BN[rows, right], last_BN[rows, left] = left, right
            bracketed = turn < lengths_B[rows] - 2
            opens_BN[rows, left] += bracketed
            closes_BN[rows, right] += bracketed
        return values_BN[:, 0]

    def _write(
        self,
        numbers_BN: np.ndarray,
        operators_BN: np.ndarray,
        opens_BN: np.ndarray,
        closes_BN: np.ndarray,
        lengths_B: np.ndarray,
    ) -> np.ndarray:
        """Return the tokens (B, P) of the expressions, = behind them and then -1."""
        inside_BN = np.arange(numbers_BN.shape[1]) < lengths_B[:, None]
        # Each number comes with its brackets before and behind it, and an operator or the sign = last.
        sizes_BN = (opens_BN + closes_BN + 2) * inside_BN
        starts_BN = np.cumsum(sizes_BN, axis=1) - sizes_BN
        tokens_BP = np.full((len(lengths_B), self.prompt_room), -1, dtype=np.int64)
        rows_BN = np.broadcast_to(np.arange(len(lengths_B))[:, None], inside_BN.shape)
        for symbol, before, count_BN in (("(", 0 * opens_BN, opens_BN), (")", opens_BN + 1, closes_BN)):
            for number in range(int(count_BN.max(initial=0))):
                chosen = inside_BN & (number < count_BN)
                places = (starts_BN + before + number)[chosen]
                tokens_BP[rows_BN[chosen], places] = self.alphabet.id_of(symbol)
        tokens_BP[rows_BN[inside_BN], (starts_BN + opens_BN)[inside_BN]] = numbers_BN[inside_BN]
        last_BN = np.arange(numbers_BN.shape[1]) == (lengths_B - 1)[:, None]
        signs_BN = np.where(last_BN, self.alphabet.id_of("="), operators_BN)
        tokens_BP[rows_BN[inside_BN], (starts_BN + sizes_BN - 1)[inside_BN]] = signs_BN[inside_BN]
        return tokens_BP

    def solve(self, prompt: list[int]) -> list[int]:
        symbols = [self.alphabet.symbols[token] for token in prompt]
        value, place = self._sum(symbols, 0)
        if symbols[place:] != ["="]:
            raise UserError(f"expected an expression such as 3+4*2=, got {''.join(symbols)!r}")
        return [value % self.config.modulus]

    def _sum(self, symbols: list[str], place: int) -> tuple[int, int]:
        value, place = self._product(symbols, place)
        while place < len(symbols) and symbols[place] in "+-":
            term, after = self._product(symbols, place + 1)
            value, place = (value + term if symbols[place] == "+" else value - term), after
        return value, place

    def _product(self, symbols: list[str], place: int) -> tuple[int, int]:
        value, place = self._operand(symbols, place)
        while place < len(symbols) and symbols[place] == "*":
            factor, place = self._operand(symbols, place + 1)
            value = value * factor % self.config.modulus
        return value, place

    def _operand(self, symbols: list[str], place: int) -> tuple[int, int]:
        if symbols[place : place + 1] == ["("]:
            value, place = self._sum(symbols, place + 1)
            if symbols[place : place + 1] == [")"]:
                return value, place + 1
        elif place < len(symbols) and symbols[place] in self.alphabet.digits:
            return self.alphabet.id_of(symbols[place]), place + 1
        raise UserError(f"expected an expression such as 3+4*2=, got {''.join(symbols)!r}")

    def tags(self, prompt: list[int]) -> dict[str, int | str]:
        return {"length": sum(token < self.config.modulus for token in prompt)}


def _tokens(numbers: int, brackets: bool) -> int:
    """Return the tokens of the longest prompt with so many numbers: they, operators, brackets and =."""
    return 2 * numbers + (2 * max(numbers - 2, 0) if brackets else 0)
