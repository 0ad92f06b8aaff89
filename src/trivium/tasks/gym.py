"""Problems of reasoning-gym's generators (extra `gym`; arXiv 2505.24760), with strictly checked answers.

Its own scorers give part of the points to answers that contain the right one, and its items are drawn from seed +
index, so that the training set of one seed is the test set of the next. Here an answer is right when it equals the
generator's, character by character; a problem's split is that which a hash of its question falls in.
"""

import hashlib
import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.answers import strip_end
from trivium.tasks.base import SPLITS, TASKS, Example, Split, Task, TaskConfig, Verdict
from trivium.tasks.counter_random import GOLDEN, key, mix
from trivium.tasks.drawn import END, SMALLEST_FRACTION

ASK = "<answer>"
PRINTED = tuple(map(chr, range(32, 127)))
DRAWS = 2**31  # reasoning-gym adds the index to its seed, and some generators want less than 2^32
ATTEMPTS = 4096  # draws for one problem: a split may have a thousandth of them
PROBES = 8


@TASKS.register("gym")
@dataclass(frozen=True)
class GymConfig(TaskConfig):
    """Problems of one reasoning-gym generator, as text."""

    extra: ClassVar[str | None] = "gym"

    dataset: str = "chain_sum"
    """Name of the generator, as reasoning-gym registers it."""
    options: str = ""
    """The generator's own options, such as "min_terms=2, max_terms=3"."""
    max_tokens: int = 512
    """Characters of the longest question and answer together; problems that are longer, or not ASCII, are redrawn."""
    train_examples: int | None = None
    """Size of a finite training set; null never runs out of problems."""
    validation_fraction: float = 0.05
    """Share of all problems kept for validation."""
    test_fraction: float = 0.05
    """Share of all problems kept for the final test."""
    seed: int = 0
    """Seed of the problems that are drawn; which split a problem belongs to does not depend on it."""

    def __post_init__(self):
        for name in ("max_tokens", "train_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("validation_fraction", "test_fraction"):
            if not SMALLEST_FRACTION <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected {SMALLEST_FRACTION} to below 1, got {getattr(self, name)}")
        if self.validation_fraction + self.test_fraction > 1 - SMALLEST_FRACTION:
            raise UserError(f"test_fraction: {self.test_fraction} and validation_fraction leave nothing to train on")
        parse_options(self.options)

    def build(self) -> "Gym":
        return Gym(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["GymConfig"]:
        if importlib.util.find_spec("reasoning_gym") is None:
            return []
        return [
            cls(options="min_terms=2, max_terms=2, max_digits=2"),
            cls(dataset="letter_counting", options="max_words=6", max_tokens=200, train_examples=30),
        ]


def parse_options(text: str) -> dict[str, Any]:
    """Return the options that `text` lists as `name=value, ...`, values as in YAML; UserError where it does not."""
    options: dict[str, Any] = {}
    # A comma inside brackets belongs to a value.
    for part in re.split(r",(?![^\[(]*[\])])", text) if text.strip() else []:
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier() or name.strip() in options:
            raise UserError(f"options: expected name=value, ..., each name once; got {text!r}")
        try:
            options[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"options: {value.strip()!r} is not a value") from None
    return options


def _open(name: str, options: dict[str, Any]) -> Any:
    """Return a reasoning-gym data set; UserError when the package, the name or an option is not there."""
    try:
        gym: Any = importlib.import_module("reasoning_gym")  # an extra, and slow to import
        known = importlib.import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise UserError(
            f"task 'gym' needs reasoning-gym ({error}); install it with: pip install 'trivium[gym]'"
        ) from None
    if name not in known:
        raise UserError(f"dataset: reasoning-gym has no {name!r}; it has {', '.join(sorted(known))}")
    reserved = {"seed", "size"} & set(options)
    if reserved:
        raise UserError(f"options: {reserved.pop()} is not an option here; the task draws its own problems")
    try:
        return gym.create_dataset(name, seed=0, size=DRAWS, **options)
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"options: reasoning-gym's {name} does not take {options}: {error}") from None


class Gym(Task):
    """A generator's question, the symbol `<answer>`, and its answer."""

    config: GymConfig

    def __init__(self, config: GymConfig):
        self.config = config
        self.alphabet = Alphabet((*PRINTED, "\n", "\t", ASK, END), tuple("0123456789"), end=END, pad=END)
        self._writable = set(PRINTED) | {"\n", "\t"}
        self.max_length = config.max_tokens + 2
        self._dataset = _open(config.dataset, parse_options(config.options))
        # Drawing is slow, and collating, regions and tags ask for the same problem.
        self._drawn = lru_cache(maxsize=4096)(self._draw)
        for split in SPLITS:
            for index in range(PROBES if split == "train" else 1):
                self.example(split, index)

    def size(self, split: Split) -> int | None:
        return self.config.train_examples if split == "train" else None

    def _item(self, draw: int) -> tuple[str, str] | None:
        """Return (question, answer) of one draw, None when it cannot be written; UserError when it has no answer."""
        try:
            item = self._dataset[draw]
        except Exception as error:  # a generator's own failure, of any kind
            raise UserError(f"reasoning-gym's {self.config.dataset} failed on problem {draw}: {error!r}") from error
        question, answer = item["question"], item["answer"]
        if not isinstance(answer, str):
            raise UserError(f"reasoning-gym's {self.config.dataset} has no single answer that text could equal")
        fits = len(answer) > 0 and len(question) + len(answer) <= self.config.max_tokens
        return (question, answer) if fits and set(question + answer) <= self._writable else None

    def _draw(self, split: Split, index: int) -> tuple[str, str]:
        stream = mix(key(self.config.seed, SPLITS.index(split)) + mix(np.array([index], dtype=np.uint64) + GOLDEN))
        written = attempt = 0
        for attempt in range(1, ATTEMPTS + 1):
            draw = int(mix(stream + np.array([attempt], dtype=np.uint64) * GOLDEN)[0]) % DRAWS
            item = self._item(draw)
            if item is not None and self._split_of(item[0]) == split:
                return item
            written += item is not None
            if attempt == 64 and not written:
                break
        why = f"{written} of {attempt} draws were short enough and ASCII; see max_tokens ({self.config.max_tokens})"
        raise UserError(f"reasoning-gym's {self.config.dataset} has too few problems for the {split} split: {why}")

    def _split_of(self, question: str) -> Split:
        """Return the split of a question: the lowest hashes are test, the next validation, the rest train."""
        share = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest()) / 2**64
        if share < self.config.test_fraction:
            return "test"
        return "validation" if share < self.config.test_fraction + self.config.validation_fraction else "train"

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        if stage:
            return self.staged(stage).example(split, index)
        question, answer = self._drawn(split, int(index))
        return Example(question + ASK, answer + END, {"answer_length": len(answer)})

    def canonical(self, example: Example) -> str:
        return example.prompt

    def parse(self, expression: str) -> Example:
        """Read a question that a person typed: no generator is at hand that could check its answer."""
        prompt = expression.removesuffix(ASK) + ASK
        self.alphabet.encode(prompt)
        return Example(prompt, "")

    def verify(self, example: Example, text: str) -> Verdict:
        """Decide whether `text` is the generator's answer, every character of it and nothing more."""
        wanted = strip_end(self.alphabet, example.answer)[0]
        body, ended = strip_end(self.alphabet, text)
        if body != wanted:
            body = body.removeprefix(example.prompt)
        if not ended:
            return Verdict(False, body or None, "the answer does not end")
        return Verdict(True, body) if body == wanted else Verdict(False, body, f"{wanted} is right")
