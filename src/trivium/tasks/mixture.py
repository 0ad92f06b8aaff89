"""Several tasks at once: training problems come from all of them by weight, and one of them is scored.

Each block of consecutive training problems holds every source's share of it, in an order of its own; a finite source
is read in whole epochs. What problem an index is depends on nothing but the index and the weights in force there, so
that training may change weights (`reweighted`) and a resumed run sees the same problems.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trivium.registry import UserError
from trivium.tasks.base import PAD, TASKS, Batch, Example, Split, Step, Task, TaskConfig, Verdict
from trivium.tasks.counter_random import key, unit, words

BLOCK = 256  # training problems among which the shares of the sources are kept
SOURCE = "source"
_SEED_BITS = 40  # a stream of problems without end gives each seed a range of indices of its own

Weights = Mapping[str, float]
Segments = tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    task: TaskConfig
    """Where its problems come from."""
    weight: float = 1.0
    """Its share of the training problems, beside the other weights; 0 leaves it out until training raises it."""

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"weight: expected 0 or more, got {self.weight}")


@TASKS.register("mixture")
@dataclass(frozen=True)
class MixtureConfig(TaskConfig):
    """Training problems of several tasks by weight; validation and test problems of one of them."""

    sources: dict[str, SourceConfig] = field(hash=False)
    """The tasks by names of your own."""
    main: str | None = None
    """Source whose validation and test problems are scored (default: the first)."""

    def __post_init__(self):
        if not self.sources:
            raise UserError("sources: expected one task or more, got none")
        if self.main is not None and self.main not in self.sources:
            raise UserError(f"main: there is no source {self.main!r}; allowed: {', '.join(self.sources)}")
        if not any(source.weight for source in self.sources.values()):
            raise UserError("sources: every weight is 0; give one more than that")
        nested = [name for name, source in self.sources.items() if isinstance(source.task, MixtureConfig)]
        if nested:
            raise UserError(f"sources.{nested[0]}: a mixture cannot hold a mixture")

    def build(self) -> "Mixture":
        return Mixture(self)

    def resolved(self) -> "MixtureConfig":
        return self.build().config

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["MixtureConfig"]:
        from trivium.tasks.addition import AdditionConfig
        from trivium.tasks.arithmetic_problems import ArithmeticProblemsConfig

        sums = [AdditionConfig(max_digits=digits) for digits in (2, 3)]
        problems = [ArithmeticProblemsConfig(train_examples=count, held_out=15, seed=count) for count in (20, 31)]
        return [
            cls({"small": SourceConfig(sums[0], 3.0), "large": SourceConfig(sums[1], 1.0)}, main="large"),
            cls({"one": SourceConfig(problems[0], 0.3), "two": SourceConfig(problems[1], 0.0)}),
        ]


class Mixture(Task):
    """See MixtureConfig. An example's tag `source` says where it is from; its other tags are those that all have."""

    config: MixtureConfig

    def __init__(self, config: MixtureConfig):
        self.sources: dict[str, Task] = {}
        for name, source in config.sources.items():
            try:
                self.sources[name] = source.task.build()
            except UserError as error:
                raise UserError(f"sources.{name}.task.{error}") from None
        self.names = list(self.sources)
        self.main = config.main or self.names[0]
        first = self.sources[self.main]
        for name, task in self.sources.items():
            for what in ("alphabet", "labels", "least_first"):
                if getattr(task, what) != getattr(first, what):
                    told = "vocabulary" if what == "alphabet" else what
                    raise UserError(f"sources.{name}: its {told} is not that of {self.main}, and a model has one")
        self.alphabet, self.least_first = first.alphabet, first.least_first
        self.labels = first.labels  # pyright: ignore[reportAttributeAccessIssue]
        for told in ("checks_half_problems", "checks_answers", "reads_values"):
            setattr(self, told, getattr(first, told))
        self.packs_documents = any(task.packs_documents for task in self.sources.values())
        counts = {task.answer_tokens for task in self.sources.values()}
        self.answer_tokens = counts.pop() if len(counts) == 1 else None
        self.max_length = max(task.max_length for task in self.sources.values())
        resolved = {
            name: dataclasses.replace(source, task=self.sources[name].config) for name, source in config.sources.items()
        }
        self.config = dataclasses.replace(config, sources=resolved)
        self.segments: Segments = ((0, tuple(source.weight for source in config.sources.values())),)
        self._reweighted: dict[Segments, Mixture] = {}

    @cached_property
    def _shared_tags(self) -> set[str] | None:
        tags = [set(task.example("train", 0).tags) for task in self.sources.values()] if len(self.names) > 1 else []
        return set.intersection(*tags) if tags else None

    def reweighted(self, segments: Sequence[tuple[int, Weights]]) -> "Mixture":
        """Return this mixture with other weights: each pair says from which training index on which are in force.

        Indices are those of a stream of one seed, from 0, ascending. Raises ValueError for others.
        """
        made: Segments = tuple((start, tuple(weights[name] for name in self.names)) for start, weights in segments)
        starts = [start for start, _ in made]
        if not starts or starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"segments: expected ascending starts from 0, got {starts}")
        if made == self.segments:
            return self
        if made not in self._reweighted:
            other = object.__new__(Mixture)
            vars(other).update(vars(self))
            other.segments, other._reweighted = made, {}
            self._reweighted = {made: other}  # the newest alone: a run looks back at no other
        return self._reweighted[made]

    def size(self, split: Split) -> int | None:
        return None if split == "train" else self.sources[self.main].size(split)

    def place(self, index: int) -> tuple[str, int]:
        """Return the source of a training index, and the index that its problem has there."""
        seed, local = index >> _SEED_BITS, index & ((1 << _SEED_BITS) - 1)
        number = max(n for n, (start, _) in enumerate(self.segments) if start <= local)
        start, weights = self.segments[number]
        block, offset = divmod(local - start, BLOCK)
        counts = self._counts_before(seed, number, block)
        sources = _sources_of_block(seed, start, block, weights)
        source = int(sources[offset])
        return self.names[source], self._index_in(
            source, seed, counts[source] + int((sources[:offset] == source).sum())
        )

    def _counts_before(self, seed: int, number: int, block: int) -> np.ndarray:
        """Return how many problems of each source come before a block of a segment."""
        total = np.zeros(len(self.names), dtype=np.int64)
        for (start, weights), following in zip(self.segments[:number], self.segments[1 : number + 1], strict=True):
            blocks, rest = divmod(following[0] - start, BLOCK)
            total += _counts(seed, start, blocks, weights)
            total += np.bincount(_sources_of_block(seed, start, blocks, weights)[:rest], minlength=len(self.names))
        start, weights = self.segments[number]
        return total + _counts(seed, start, block, weights)

    def _index_in(self, source: int, seed: int, count: int) -> int:
        size = self.sources[self.names[source]].size("train")
        if size is None:
            return (seed << _SEED_BITS) + count
        epoch, place = divmod(count, size)
        return int(_order(seed, source, epoch, size)[place])

    def _named(self, name: str, example: Example) -> Example:
        tags = example.tags if self._shared_tags is None else {tag: example.tags[tag] for tag in self._shared_tags}
        return dataclasses.replace(example, tags={**tags, SOURCE: name})

    def _of(self, example: Example) -> Task:
        return self.sources[str(example.tags.get(SOURCE, self.main))]

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        name, index = self.place(index) if split == "train" else (self.main, index)
        return self._named(name, self.sources[name].example(split, index))

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        if split != "train":
            return self.sources[self.main].gather(split, indices)
        places = [self.place(int(index)) for index in indices]
        rows: list[tuple[np.ndarray, Batch]] = []
        for name in self.names:
            mine = [row for row, (source, _) in enumerate(places) if source == name]
            if mine:
                inside = np.array([places[row][1] for row in mine], dtype=np.int64)
                rows.append((np.array(mine), self.sources[name].gather("train", inside)))
        return join(rows, self.alphabet.pad_id)

    def canonical(self, example: Example) -> Hashable:
        return self._of(example).canonical(example)

    def verify(self, example: Example, text: str) -> Verdict:
        return self._of(example).verify(example, text)

    def readings(self, example: Example, text: str) -> dict[str, Verdict]:
        return self._of(example).readings(example, text)

    def constant_answer(self) -> str | None:
        return self.sources[self.main].constant_answer()

    def steps(self, example: Example, text: str) -> list[Step]:
        return self._of(example).steps(example, text)

    def answer_from_steps(self, example: Example, text: str) -> str | None:
        return self._of(example).answer_from_steps(example, text)

    def corrupt_step(self, example: Example, text: str, rng: np.random.Generator) -> str | None:
        return self._of(example).corrupt_step(example, text, rng)

    def readable(self, text: str) -> str:
        return self.sources[self.main].readable(text)

    def parse(self, expression: str) -> Example:
        return self._named(self.main, self.sources[self.main].parse(expression))

    def regions(self, example: Example) -> list[int]:
        return self._of(example).regions(example)

    def target_regions(self, example: Example) -> list[int]:
        return self._of(example).target_regions(example)

    def encode(self, example: Example) -> tuple[list[int], list[int], list[float]]:
        return self._of(example).encode(example)


def join(parts: Sequence[tuple[np.ndarray, Batch]], pad_id: int) -> Batch:
    """Return one batch of the rows of several, each of which goes to the places that stand beside it."""
    count = sum(len(places) for places, _ in parts)
    width = max((batch.tokens_BT.shape[1] for _, batch in parts), default=0)
    fills: dict[str, Any] = {"tokens_BT": pad_id, "targets_BT": pad_id, "weights_BT": 0, "regions_BT": PAD}
    types = {"weights_BT": np.float32, "regions_BT": np.uint8}
    made = {name: np.full((count, width), fill, dtype=types.get(name, np.int64)) for name, fill in fills.items()}
    made |= {name: np.zeros(count, dtype=np.int64) for name in ("lengths_B", "prompt_lengths_B")}
    for places, batch in parts:
        for name, array in made.items():
            values = getattr(batch, name)
            if values.ndim == 2:
                array[places[:, None], np.arange(values.shape[1])] = values
            else:
                array[places] = values
    if any(batch.documents_BT is not None for _, batch in parts):
        made["documents_BT"] = np.zeros((count, width), dtype=np.int64)
        for places, batch in parts:
            if batch.documents_BT is not None:
                made["documents_BT"][places[:, None], np.arange(batch.documents_BT.shape[1])] = batch.documents_BT
    return Batch(**made)


@lru_cache(maxsize=64)
def _order(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed * 64 + source, epoch])).permutation(size)


def _offsets(seed: int, start: int, blocks: np.ndarray) -> np.ndarray:
    """Return in [0, 1) where each block's even grid of shares begins."""
    return unit(words(key(seed, start, 1), int(blocks[0]), len(blocks))[:, 0]) if len(blocks) else np.zeros(0)


def _block_counts(offsets: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """Return (blocks, sources): how many points (j + offset) / BLOCK of a grid lie in each source's share of [0, 1)."""
    bounds = np.cumsum(np.array(weights) / sum(weights))
    bounds[-1] = 1.0
    below = np.ceil(BLOCK * bounds[None] - offsets[:, None]).astype(np.int64).clip(0, BLOCK)
    return np.diff(below, axis=1, prepend=0)


@lru_cache(maxsize=256)
def _sources_of_block(seed: int, start: int, block: int, weights: tuple[float, ...]) -> np.ndarray:
    """Return the source of each problem of a block, in an order of its own."""
    each = _block_counts(_offsets(seed, start, np.array([block])), weights)[0]
    order = np.random.Generator(np.random.Philox(key=[seed, (start << 20) + block])).permutation(BLOCK)
    return np.repeat(np.arange(len(weights)), each)[order]


_CHUNK = 4096  # blocks that are counted together


@lru_cache(maxsize=64)
def _chunk_counts(seed: int, start: int, chunk: int, weights: tuple[float, ...]) -> np.ndarray:
    """Return (blocks of a chunk + 1, sources): how many problems of each source come before each of its blocks."""
    each = _block_counts(_offsets(seed, start, np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)), weights)
    return np.concatenate([np.zeros_like(each[:1]), each.cumsum(0)])


def _counts(seed: int, start: int, blocks: int, weights: tuple[float, ...]) -> np.ndarray:
    chunks, rest = divmod(blocks, _CHUNK)
    return _chunk_counts(seed, start, chunks, weights)[rest] + sum(
        _chunk_counts(seed, start, chunk, weights)[-1] for chunk in range(chunks)
    )
