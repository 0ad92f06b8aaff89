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
from pathlib import Path

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.arithmetic_templates import PEOPLE, TEMPLATES, Template
from trivium.tasks.base import (
    SPLITS,
    TASKS,
    Example,
    Split,
    TaskConfig,
)
from trivium.tasks.byte_pairs import Vocabulary, load_byte_pairs
from trivium.tasks.calculator import evaluate
from trivium.tasks.counter_random import key, words
from trivium.tasks.word_answers import WordTask

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


class ArithmeticProblems(WordTask):
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
        return max(self.tokens_of(example) for split in SPLITS for example in self.problems(split))

    def problems(self, split: Split) -> list[Example]:
        if split not in self._made:
            self._make_all()
        return self._made[split]

    def _make_all(self) -> None:
        counts: dict[Split, int] = {
            split: self.config.train_examples if split == "train" else self.config.held_out for split in SPLITS
        }
        made: dict[Split, list[Example]] = {split: [] for split in SPLITS}
        seen: set[object] = set()
        attempt, stale = 0, 0
        while any(len(made[split]) < counts[split] for split in SPLITS):
            example = draw(self.config.seed, attempt, self.alphabet.end)
            attempt, stale = attempt + 1, stale + 1
            if stale > STALE:
                short: Split = next(split for split in SPLITS if len(made[split]) < counts[split])
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

    def canonical(self, example: Example) -> object:
        """Return the template and the numbers: other names and goods do not make another problem."""
        return example.tags.get("template", ""), tuple(map(int, _NUMBER.findall(example.prompt)))


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
