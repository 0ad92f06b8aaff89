"""Addition: sums in any base, checked by arithmetic. Formats and their worked examples are in `addition_formats`."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from trivium.config import UserError
from trivium.tasks import addition_chains
from trivium.tasks.addition_arrays import Encoder, Problems, joined
from trivium.tasks.addition_formats import END, NOOP, Format, Notation, columns_of
from trivium.tasks.addition_sampling import SMALLEST_FRACTION, Space, check_splits, draw
from trivium.tasks.answers import THINK, chain_regions
from trivium.tasks.base import TASKS, Batch, Example, Split, Step, Task, TaskConfig, Verdict
from trivium.tasks.blocks import Blocks

MOST_AT_ONCE = 2**20  # problems drawn in one go, however many are asked for


@TASKS.register("addition")
@dataclass(frozen=True)
class AdditionConfig(TaskConfig):
    """Sums of numbers of min_digits to max_digits digits."""

    written_by: ClassVar[tuple[str, ...]] = ("format", "zero_pad", "align", "separator")

    format: Format = "reversed"
    """How a sum is written: plain, reversed, delimited, column (a chain of thought) or reversed_chain."""
    base: int = 10
    """Base of the numbers, 2 to 36; the digits are 0-9 and A-Z."""
    operands: int = 2
    """Numbers in a sum."""
    min_digits: int = 1
    """Digits of the shortest number."""
    max_digits: int = 3
    """Digits of the longest number."""
    digits: tuple[int, ...] = ()
    """Digits of each number of a sum, where they are not drawn from min_digits to max_digits."""
    zero_pad: bool = False
    """Zero-fill each number to max_digits, and the answer to as many digits as any sum can need."""
    align: bool = False
    """Zero-fill each number to the digits of the longest in its sum, and the answer to as many as that can need."""
    stratify: Literal["uniform", "carry"] = "uniform"
    """Draw digit counts uniformly, or draw the longest carry chain uniformly over the feasible lengths."""
    separator: str = " "
    """Symbol between the steps of a column chain: one character, or a name in angle brackets."""
    train_examples: int | None = None
    """Size of a finite training set; null never runs out of problems."""
    validation_fraction: float = 0.05
    """Share of all problems kept for validation."""
    test_fraction: float = 0.05
    """Share of all problems kept for the final test."""
    seed: int = 0
    """Seed of the problems that are drawn; which split a problem belongs to does not depend on it."""

    def __post_init__(self):
        if self.format not in ("plain", "reversed", "delimited", "column", "reversed_chain"):
            raise UserError(
                f"format: {self.format!r} is not allowed; allowed: plain, reversed, delimited, column, reversed_chain"
            )
        if self.stratify not in ("uniform", "carry"):
            raise UserError(f"stratify: {self.stratify!r} is not allowed; allowed: uniform, carry")
        if self.align and self.zero_pad:
            raise UserError("align: given beside zero_pad, which fills to max_digits; give only one of them")
        if not 2 <= self.base <= 36:
            raise UserError(f"base: expected 2 to 36, got {self.base}")
        if not 2 <= self.operands <= 100:
            raise UserError(f"operands: expected 2 to 100, got {self.operands}")
        if self.min_digits < 1:
            raise UserError(f"min_digits: expected 1 or more, got {self.min_digits}")
        if not self.min_digits <= self.max_digits <= 10_000:
            raise UserError(f"max_digits: expected min_digits ({self.min_digits}) to 10000, got {self.max_digits}")
        if self.digits and (len(self.digits) != self.operands or not 1 <= min(self.digits) <= max(self.digits)):
            raise UserError(f"digits: expected {self.operands} counts of 1 or more, got {list(self.digits)}")
        if self.digits and (max(self.digits) > self.max_digits or self.min_digits > 1 or self.stratify != "uniform"):
            raise UserError(
                f"digits: {list(self.digits)} needs max_digits {max(self.digits)} or more, min_digits 1 and "
                "stratify uniform"
            )
        if self.train_examples is not None and self.train_examples < 1:
            raise UserError(f"train_examples: expected 1 or more, or null, got {self.train_examples}")
        for name in ("validation_fraction", "test_fraction"):
            if not SMALLEST_FRACTION <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected {SMALLEST_FRACTION} to below 1, got {getattr(self, name)}")
        if self.validation_fraction + self.test_fraction > 1 - SMALLEST_FRACTION:
            raise UserError(
                f"test_fraction: {self.test_fraction} and validation_fraction {self.validation_fraction} "
                "leave nothing to train on"
            )
        if not re.fullmatch(r"[^0-9A-Za-z+=<>]|<\w+>", self.separator) or self.separator in (END, THINK, NOOP):
            raise UserError(
                f"separator: expected one character that no number or sum uses, or <name>, got {self.separator!r}"
            )
        check_splits(self.space)

    @property
    def space(self) -> Space:
        """The problems that can be drawn, whatever their format."""
        return Space(
            self.base,
            self.operands,
            self.min_digits,
            self.max_digits,
            self.stratify == "carry",
            self.validation_fraction,
            self.test_fraction,
            self.digits,
        )

    def of_pair(self, first: int, second: int) -> "AdditionConfig":
        """Return this task with sums of a number of `first` and one of `second` digits."""
        if self.operands != 2:
            raise UserError(f"sums of {self.operands} numbers have no two lengths to choose")
        longest = max(first, second)
        width = max(self.max_digits, longest) if self.zero_pad else longest
        return replace(self, digits=(first, second), min_digits=1, max_digits=width, stratify="uniform")

    def of_lengths(self, shortest: int | None, longest: int) -> "AdditionConfig":
        """Return this task with numbers of `shortest` to `longest` digits."""
        return replace(
            self, digits=(), min_digits=self.min_digits if shortest is None else shortest, max_digits=longest
        )

    def build(self) -> "Addition":
        return Addition(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["AdditionConfig"]:
        return [
            cls(format="plain"),
            cls(format="reversed", max_digits=4),
            cls(format="reversed", zero_pad=True),
            cls(format="delimited", base=16),
            cls(format="plain", align=True, base=3, operands=3, max_digits=5),
            cls(format="column", align=True),
            cls(format="reversed", align=True, digits=(5, 2), max_digits=5),
            cls(format="delimited", base=2, max_digits=9, operands=3),
            cls(format="column"),
            cls(format="column", base=36, operands=4, max_digits=2, separator="<sep>"),
            cls(format="column", stratify="carry", max_digits=6, zero_pad=True, train_examples=100),
            cls(format="reversed_chain", stratify="carry", operands=3, min_digits=2, max_digits=5),
        ]


class Addition(Task):
    """Sums of natural numbers. Operands are Python integers of any size; text is in the config's format and base."""

    checks_half_problems = True
    config: AdditionConfig

    def __init__(self, config: AdditionConfig):
        self.config = config
        self.notation = Notation(
            config.format,
            config.base,
            config.operands,
            config.max_digits if config.zero_pad else 0,
            config.separator,
            config.align,
        )
        self.alphabet = self.notation.alphabet
        self.least_first = self.notation.least_first
        self.closing = () if config.format == "delimited" else ("+",)
        # Every length grows with the digits and with the carries, and the largest operands have the most of both.
        most = config.digits or (config.max_digits,) * config.operands
        self.max_length = len(self.alphabet.encode(self.render(*(config.base**count - 1 for count in most))))
        if config.zero_pad and not self.notation.has_chain:
            self.answer_tokens = self.notation.answer_width(config.max_digits)
        self._encoder = Encoder(self.notation, config.max_digits)
        self._blocks = Blocks(self.max_length, self._encoded)
        self._chosen: tuple[Split, np.ndarray, Problems] | None = None  # the last distinct indices, and their problems

    def largest_shift(self) -> tuple[int, str]:
        """Return the digits of the shortest last number: a sum's first digit needs that number's first digit."""
        if not self.least_first:
            return 1, "the last number has to be read before its sum is begun, as it ends with its least digit"
        digits = self.config.max_digits if self.config.zero_pad else self.config.min_digits
        return digits, f"the first digit of a sum needs that of the last number, which may have {digits} digits only"

    def size(self, split: Split) -> int | None:
        return self.config.train_examples if split == "train" else None

    def published(self, name: str) -> Sequence[Example]:
        """Return the test set `adderboard`: the ten edge cases and ten thousand pairs below 10^10 of a public contest.

        Source: github.com/anadim/AdderBoard. The pairs are of `random.Random(2025)`, both numbers of one drawn in turn.
        """
        if name != "adderboard":
            raise UserError(f"no test set {name!r}; allowed: adderboard")
        if (self.config.base, self.config.operands) != (10, 2) or self.config.max_digits < 10:
            raise UserError("adderboard: its sums are of two numbers of up to 10 digits, in base 10")
        largest, drawn = 10**10 - 1, random.Random(2025)
        edges = [(0, 0), (0, 1), (largest, 0), (largest, 1), (largest, largest), (5 * 10**9, 5 * 10**9)]
        edges += [(1111111111, 8888888889), (1234567890, 9876543210), (largest, largest), (1, largest)]
        pairs = [(drawn.randint(0, largest), drawn.randint(0, largest)) for _ in range(10_000)]
        return [self.example_of(pair) for pair in (*edges, *pairs)]

    def render(self, *operands: int) -> str:
        """Return the whole text of one problem, such as `99+21=120<end>`."""
        example = self.example_of(operands)
        return example.prompt + example.answer

    def example_of(self, operands: Sequence[int]) -> Example:
        """Return the problem of adding `operands`, which need not be of the lengths that are drawn."""
        if len(operands) != self.config.operands or any(operand < 0 for operand in operands):
            raise UserError(f"expected {self.config.operands} natural numbers, got {list(operands)}")
        columns = columns_of(operands, self.config.base)
        carries = [total >= self.config.base for _, _, total in columns]
        runs = "".join("c" if carry else " " for carry in carries).split()
        tags: dict[str, int | str] = {
            "digits": len(columns),
            "carries": sum(carries),
            "longest_carry_chain": max(map(len, runs), default=0),
        }
        if self.config.operands > 2:
            tags["operands"] = self.config.operands
        return Example(self.notation.write_prompt(operands), self.notation.write_answer(operands), tags)

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        return self.examples(split, np.array([index]), stage)[0]

    def examples(self, split: Split, indices: np.ndarray, stage: int = 0) -> list[Example]:
        if stage:
            return self.staged(stage).examples(split, indices)
        problems = self._draw(split, np.asarray(indices))
        return [self.example_of(problems.operands(row)) for row in range(len(indices))]

    def tag_values(self, split: Split, indices: np.ndarray, stage: int = 0) -> dict[str, np.ndarray] | None:
        if stage:
            return self.staged(stage).tag_values(split, indices)
        problems = self._draw(split, np.asarray(indices))
        tags = {
            "digits": problems.widths,
            "carries": problems.carries(),
            "longest_carry_chain": problems.longest_chains(),
        }
        if self.config.operands > 2:
            tags["operands"] = np.full(len(indices), self.config.operands)
        return tags

    def _draw(self, split: Split, indices_B: np.ndarray) -> Problems:
        if self._chosen is not None and self._chosen[0] == split:
            # Drawing takes most of the time of a test that reads its problems again and again: see `distinct`.
            _, chosen, problems = self._chosen
            places_B = np.searchsorted(chosen, indices_B).clip(max=len(chosen) - 1)
            if (chosen[places_B] == indices_B).all():
                return problems.rows(places_B)
        return draw(self.config.space, self.config.seed, split, indices_B)[0]

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        if stage:
            return self.staged(stage).gather(split, indices)
        return self._blocks.batch(split, np.asarray(indices, dtype=np.int64))

    def _encoded(self, split: Split, indices_B: np.ndarray) -> Batch:
        return self._encoder.encode(self._draw(split, indices_B))

    def distinct(self, split: Split, count: int, stage: int = 0) -> np.ndarray:
        if stage:
            return self.staged(stage).distinct(split, count)
        size = self.size(split)
        chosen = np.zeros(0, dtype=np.int64)
        hashes = np.zeros(0, dtype=np.uint64)
        parts: list[Problems] = []
        start, last = 0, -1  # last: index of the newest problem found
        while len(chosen) < count and (size is None or start < size):
            # As many as are likely to hold what is missing.
            draws = min(2.0, 1.1 * max(1, start) / max(1, len(chosen))) * (count - len(chosen))
            stop = start + min(max(1024, int(draws)), MOST_AT_ONCE)
            indices = np.arange(start, stop if size is None else min(stop, size))
            # Two problems of one 64-bit hash would count as one: 100,000 problems lose one with a chance of 3e-10.
            known = len(hashes)
            problems, drawn = draw(self.config.space, self.config.seed, split, indices)
            _, first = np.unique(np.concatenate([hashes, drawn]), return_index=True)
            new = np.sort(first[first >= known]) - known
            # As Task.distinct: after 1000 + 20 * found draws without a new problem the search is over.
            gaps = np.diff(np.concatenate([[last], indices[new]])) - 1
            over = np.flatnonzero(gaps >= 1000 + 20 * (len(chosen) + np.arange(len(new))))
            if len(over):
                new = new[: over[0]]
            chosen = np.concatenate([chosen, indices[new]])
            hashes = np.concatenate([hashes, drawn[new]])
            parts.append(problems.rows(new))
            last = int(chosen[-1]) if len(chosen) else -1
            start = int(indices[-1]) + 1
            if len(over) or start - 1 - last >= 1000 + 20 * len(chosen):
                break
        chosen = chosen[:count]
        if len(chosen):
            self._chosen = split, chosen, joined(parts).rows(np.arange(len(chosen)))
        return chosen

    def operands_of(self, example: Example) -> list[int]:
        """Return the operands that the prompt of `example` gives; a half problem has fewer than the task."""
        try:
            return self.notation.read_prompt(example.prompt)[0]
        except ValueError:
            raise UserError(
                f"prompt {example.prompt!r} is not a problem in {self.config.format} format, base {self.config.base}"
            ) from None

    def canonical(self, example: Example) -> tuple[int, ...]:
        return tuple(sorted(self.operands_of(example)))

    def regions(self, example: Example) -> list[int]:
        return chain_regions(self.alphabet, example)

    def parse(self, expression: str) -> Example:
        prompt, operands = self.notation.parse(expression)
        return Example(prompt, "") if operands is None else self.example_of(operands)

    def readable(self, text: str) -> str:
        """Return `text` with each number most significant digit first, as a person writes it."""
        if not self.notation.least_first:
            return text
        digits = "".join(self.alphabet.digits)
        return re.sub(f"[{digits}]+", lambda match: match.group()[::-1], text)

    def verify(self, example: Example, text: str) -> Verdict:
        """Decide whether the answer in `text` is right: the whole answer, and nothing but it, before the end symbol.

        `text` is what was generated after the prompt; a prompt left in front of it is taken off. The answer of a
        chain format is what follows `</think>`. After the end symbol only end and pad symbols may stand. Where the
        example has no answer (a half problem) the generated text must first complete the problem.
        """
        return addition_chains.verify(self.notation, example, text)

    def steps(self, example: Example, text: str) -> list[Step]:
        """Return the steps of the chain in `text`; one is true when its own arithmetic is."""
        return addition_chains.steps(self.notation, text)

    def answer_from_steps(self, example: Example, text: str) -> str | None:
        return addition_chains.answer_from_steps(self.notation, text)

    def corrupt_step(self, example: Example, text: str, rng: np.random.Generator) -> str | None:
        return addition_chains.corrupt_step(self.notation, text, rng)
