"""Generated arithmetic word problems whose solutions look like GSM8K's: `<<a+b=c>>` steps, and `#### n` at the end.

Every problem is drawn from a template, its numbers are drawn until all results are whole and above 0, and each step is
checked again as it is written. No two problems of a task share their template and numbers.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.answers import strip_end
from trivium.tasks.arithmetic_templates import PEOPLE, TEMPLATES, Template
from trivium.tasks.base import (
    ANSWER,
    CHAIN,
    PROMPT,
    SPLITS,
    TASKS,
    Batch,
    Example,
    Split,
    Step,
    Task,
    TaskConfig,
    Verdict,
)
from trivium.tasks.byte_pairs import Vocabulary, load_byte_pairs
from trivium.tasks.calculator import annotations, evaluate, holds
from trivium.tasks.counter_random import key, words

END = "<end>"
# Digits first; what follows is every character that the templates and their words have.
SYMBOLS = ("0123456789", "\n !#$'*+,-./()<=>?", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
TRIES = 500  # draws of the numbers of one problem
STALE = 20_000  # draws without a new problem after which there is none
HELD_OUT = 500  # problems of the validation and of the test split
SHARES = 12  # one part of so many is validation, one is test
_NUMBER = re.compile(r"\d+")


@TASKS.register("arithmetic_problems")
@dataclass(frozen=True)
class ArithmeticProblemsConfig(TaskConfig):
    """Word problems made from templates, with solutions in GSM8K's style."""

    train_examples: int = 5000
    """Distinct problems of the train split."""
    held_out: int = HELD_OUT
    """Distinct problems of the validation split, and of the test split."""
    seed: int = 0
    """Seed of the problems."""
    tokenizer: str | None = None
    """Vocabulary: a folder with a tokenizer's files, or a hub id such as gpt2; null: characters."""
    max_length: int | None = None
    """Tokens of the longest problem (default: that of the problems)."""

    def __post_init__(self):
        for name in ("train_examples", "held_out"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more problems, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length: expected 2 or more tokens, got {self.max_length}")

    def build(self) -> "ArithmeticProblems":
        return ArithmeticProblems(self)

    def resolved(self) -> "ArithmeticProblemsConfig":
        return self.build().config

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["ArithmeticProblemsConfig"]:
        return [cls(train_examples=60, held_out=20), cls(train_examples=5, held_out=15, seed=3)]


class ArithmeticProblems(Task):
    """The problems of ArithmeticProblemsConfig. A prompt is the question and a line break."""

    config: ArithmeticProblemsConfig

    def __init__(self, config: ArithmeticProblemsConfig):
        self.alphabet: Vocabulary = (
            Alphabet((*"".join(SYMBOLS), END), tuple(SYMBOLS[0]))
            if config.tokenizer is None
            else load_byte_pairs(config.tokenizer)
        )
        self.config = config
        self._made: dict[Split, list[Example]] = {}
        # With the length at hand no problem has to be made, as when a trained model is loaded.
        self.max_length = config.max_length or self._longest
        self.config = dataclasses.replace(config, max_length=self.max_length)

    @property
    def _longest(self) -> int:
        encode = self.alphabet.encode
        problems = (example for split in SPLITS for example in self._problems(split))
        return max(len(encode(example.prompt)) + len(encode(example.answer)) for example in problems)

    def _problems(self, split: Split) -> list[Example]:
        if split not in self._made:
            self._make_all()
        return self._made[split]

    def _make_all(self) -> None:
        counts = {split: self.config.train_examples if split == "train" else self.config.held_out for split in SPLITS}
        made: dict[Split, list[Example]] = {split: [] for split in SPLITS}
        seen: set[object] = set()
        attempt, stale = 0, 0
        while any(len(made[split]) < counts[split] for split in SPLITS):
            example = draw(self.config.seed, attempt, self.alphabet.end)
            attempt, stale = attempt + 1, stale + 1
            if stale > STALE:
                short = next(split for split in SPLITS if len(made[split]) < counts[split])
                raise UserError(
                    f"the templates gave {len(made[short])} distinct {short} problems and no more in {stale} draws; "
                    f"{counts[short]} are asked for"
                )
            if example is None or (name := self.canonical(example)) in seen:
                continue
            split = split_of(name)
            if len(made[split]) < counts[split]:
                seen.add(name)
                made[split].append(example)
                stale = 0
        self._made = made

    def size(self, split: Split) -> int:
        return self.config.train_examples if split == "train" else self.config.held_out

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        if not 0 <= index < self.size(split):
            raise IndexError(f"the {split} split has {self.size(split)} problems, there is no number {index}")
        return self._problems(split)[index]

    @cached_property
    def _collated(self) -> dict[Split, Batch]:
        return {}

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        if split not in self._collated:
            whole = self.collate(self._problems(split))
            if int(whole.lengths_B.max()) + 1 > self.max_length:
                longest = int(whole.lengths_B.max()) + 1
                raise UserError(f"max_length: {self.max_length} is given, a problem has {longest} tokens")
            self._collated[split] = whole
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.size(split)):
            raise IndexError(f"the {split} split has {self.size(split)} problems, not {rows.min()} to {rows.max()}")
        return self._collated[split].take(rows)

    def canonical(self, example: Example) -> object:
        """Return the template and the numbers: other names and goods do not make another problem."""
        return example.tags.get("template", ""), tuple(map(int, _NUMBER.findall(example.prompt)))

    def regions(self, example: Example) -> list[int]:
        """Return the region of each token: the solution is CHAIN, the number behind `#### ` and the end ANSWER."""
        ids = self.alphabet.encode(example.answer)
        number = example.answer.rfind("#### ") + len("#### ")
        ends = np.cumsum([len(self.alphabet.decode([index])) for index in ids])
        prompt = len(self.alphabet.encode(example.prompt))
        return [PROMPT] * prompt + [ANSWER if end > number else CHAIN for end in ends]

    def verify(self, example: Example, text: str) -> Verdict:
        """Decide whether the number behind the last `####` of `text` is right; it has to end with the end symbol."""
        body, ended = strip_end(self.alphabet, text.removeprefix(example.prompt))
        _, sign, number = body.rpartition("####")
        if not sign:
            return Verdict(False, None, "there is no #### line")
        given = number.strip().removesuffix(".").removeprefix("$").replace(",", "")
        wanted = strip_end(self.alphabet, example.answer)[0].rpartition("####")[2].strip()
        if not ended:
            return Verdict(False, given or None, "the answer does not end")
        return Verdict(given == wanted, given, "" if given == wanted else f"{wanted} is right")

    def steps(self, example: Example, text: str) -> list[Step]:
        return [Step(f"<<{left}={right}>>", holds(left, right)) for left, right in annotations(text)]

    def answer_from_steps(self, example: Example, text: str) -> str | None:
        found = annotations(text)
        return found[-1][1] if found else None


def split_of(canonical: object) -> Split:
    """Return the split that a problem belongs to, by a hash that mixes all of its numbers."""
    share = int.from_bytes(hashlib.blake2b(repr(canonical).encode(), digest_size=8).digest(), "little") % SHARES
    return "test" if share == 0 else "validation" if share == 1 else "train"


def draw(seed: int, attempt: int, end: str) -> Example | None:
    """Return the problem of a draw, a pure function of the seed and its number; None if no numbers fit its template."""
    stream = _words(seed, attempt)
    template = TEMPLATES[next(stream) % len(TEMPLATES)]
    texts = {"who": PEOPLE[next(stream) % len(PEOPLE)]}
    texts |= {name: choices[next(stream) % len(choices)] for name, choices in template.choices.items()}
    for _ in range(TRIES):
        numbers = {name: low + next(stream) % (high - low + 1) for name, (low, high) in template.numbers.items()}
        solution = solve(template, numbers, texts)
        if solution is not None:
            question = template.question.format(**texts, **numbers)
            return Example(f"{question}\n", solution + end, {"template": template.name, "steps": len(template.steps)})
    return None


def _words(seed: int, attempt: int) -> Iterator[int]:
    """Yield random words without end, a pure function of both."""
    state = key(seed, attempt)
    for start in itertools.count(step=64):
        yield from map(int, words(state, start, 64)[:, 0])


def solve(template: Template, numbers: dict[str, int], texts: dict[str, str]) -> str | None:
    """Return the solution, without an end; None if a result is not a whole number above 0."""
    known, lines = dict(numbers), []
    for step in template.steps:
        expression = re.sub(r"[a-z]", lambda name: str(known[name[0]]), step.expression)
        value = evaluate(expression)
        if value is None or value.denominator != 1 or value <= 0:
            return None
        known[step.name] = int(value)
        lines.append(step.sentence.replace("{=}", f"{expression} = <<{expression}={value}>>{value}").format(**texts))
    return "\n".join([*lines, f"#### {known[template.steps[-1].name]}"])
