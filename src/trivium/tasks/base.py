"""The task contract: problems that are a pure function of (config, split, index, stage), with checked answers.

Shapes: B examples, T tokens. Arrays are numpy; `train` moves them to a device.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from trivium.registry import Registry, UserError
from trivium.tasks.byte_pairs import Vocabulary

TASKS = Registry("task", "trivium.tasks")

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Regions say what a target token is, so that objectives and scores can pick: the prompt is never scored.
PROMPT, CHAIN, ANSWER, PAD = 0, 1, 2, 3


@dataclass(frozen=True)
class Example:
    """One problem: the text that is given, the text that is wanted (its end symbol included), and slicing tags."""

    prompt: str
    answer: str
    tags: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The result of checking a generated text: right or wrong, the answer read from it, and why it is wrong.

    `judge` names what decided, where a rule does not always decide by itself.
    """

    correct: bool
    answer: str | None = None
    reason: str = ""
    judge: str | None = None


@dataclass(frozen=True)
class Step:
    """One step of a chain of thought: its text, and whether what it states is true."""

    text: str
    true: bool


@dataclass(frozen=True)
class Batch:
    """Encoded examples, left-aligned.

    The logits at place t are trained to predict ``targets_BT[:, t]`` with weight ``weights_BT[:, t]``: the next token,
    or the label of token t in a task that labels what it reads. `regions_BT` classifies each target (PROMPT, CHAIN,
    ANSWER, PAD); PROMPT and PAD have weight 0 here.
    `lengths_B` counts the input tokens of a row, `prompt_lengths_B` those of its prompt. `documents_BT` numbers the
    documents that are packed into a row, which a model has to keep apart; None: each row is one.
    """

    tokens_BT: np.ndarray  # int64
    targets_BT: np.ndarray  # int64
    weights_BT: np.ndarray  # float32
    regions_BT: np.ndarray  # uint8
    lengths_B: np.ndarray  # int64
    prompt_lengths_B: np.ndarray  # int64
    documents_BT: np.ndarray | None = None  # int64

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def take(self, rows: np.ndarray) -> "Batch":
        """Return a copy of `rows` (indices), cut to the longest of them."""
        lengths_B = self.lengths_B[rows]
        longest = int(lengths_B.max(initial=0))
        return Batch(
            self.tokens_BT[:, :longest].take(rows, axis=0),
            self.targets_BT[:, :longest].take(rows, axis=0),
            self.weights_BT[:, :longest].take(rows, axis=0),
            self.regions_BT[:, :longest].take(rows, axis=0),
            lengths_B,
            self.prompt_lengths_B[rows],
            None if self.documents_BT is None else self.documents_BT[:, :longest].take(rows, axis=0),
        )

    def shifted(self, shift: int, whole: bool = False) -> "Batch":
        """Return the batch whose targets lie `shift` tokens further ahead: place t is to predict token t + 1 + shift.

        With `whole`, one pass over the prompt is to give the whole answer: what is read ends with the prompt, and what
        its places do not reach, the end symbol, is not asked for. Raises ValueError for packed documents.
        """
        if shift == 0:
            return self
        if self.documents_BT is not None:
            raise ValueError("documents_BT: a target further ahead may lie in another document")
        places = max(self.tokens_BT.shape[1] - shift, 0)
        lengths_B = self.prompt_lengths_B if whole else np.maximum(self.lengths_B - shift, 0)
        if whole:
            places = min(places, int(lengths_B.max(initial=0)))
        moved = slice(shift, shift + places)
        weights_BT, regions_BT = self.weights_BT[:, moved], self.regions_BT[:, moved]
        if whole:
            outside_BT = np.arange(places) >= lengths_B[:, None]
            weights_BT = np.where(outside_BT, np.float32(0), weights_BT)
            regions_BT = np.where(outside_BT, np.uint8(PAD), regions_BT)
        return Batch(
            self.tokens_BT[:, :places],
            self.targets_BT[:, moved],
            weights_BT,
            regions_BT,
            lengths_B,
            self.prompt_lengths_B,
        )


@dataclass(frozen=True)
class TaskConfig(ABC):
    """Base of every task's config; ``kind`` names it in a recipe and ``build()`` makes the task."""

    registry: ClassVar[Registry] = TASKS
    kind: ClassVar[str]
    extra: ClassVar[str | None] = None  # what must be installed for the task, if anything
    written_by: ClassVar[tuple[str, ...]] = ()  # the fields that say how problems are written, but not which they are

    @abstractmethod
    def build(self) -> "Task": ...

    def resolved(self) -> "TaskConfig":
        """Return this config with what it derives from files written out, so that it builds where they are not."""
        return self

    def of_lengths(self, shortest: int | None, longest: int) -> "TaskConfig":
        """Return this task with problems of `shortest` (None: as it is) to `longest` only, in the task's own unit.

        The alphabet stays, and so does the split that a problem belongs to. Raises UserError when the task has no
        length to choose or none of these.
        """
        raise UserError(f"the problems of task {self.kind!r} have no length to choose")

    def of_pair(self, first: int, second: int) -> "TaskConfig":
        """Return this task with problems of two numbers of these lengths; UserError when it has none."""
        raise UserError(f"the problems of task {self.kind!r} have no two lengths to choose")

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["TaskConfig"]:
        """Return small configs that the contract tests run; override to cover each format.

        A task that reads files writes small ones into `folder`, and has no examples without one. One whose extra is
        not installed has none.
        """
        return [cls()]


class Task(ABC):
    """Makes, encodes and checks problems. Subclasses set `alphabet`, `max_length` and `version`.

    `max_length` is one more than the tokens of the longest possible input. `checks_half_problems` says that `verify`
    can judge an example without answer, once the generated text has completed its problem. `labels` says that the
    answer is not generated but read at the places of the prompt, all in one pass: the input is the prompt alone, and
    the answer's symbols are the targets of the places that are scored, in order, and then the end symbol.
    `checks_answers` is false for a task of mere text, whose examples are stretches of it that `encode` knows by more
    than their words: nothing is generated, and what is scored is each next token. `reads_values` says that `verify`
    compares values, so that what stands around an answer, or another way to write it, does not count.
    `packs_documents` says that batches tell documents apart (`Batch.documents_BT`).
    `least_first` says that every number is written least significant digit first, so that digits of equal significance
    are equally far from the starts of their runs. `closing` are the symbols that end a number of the prompt, where that
    which ends the last is another one. `answer_tokens` is the number of tokens of every answer, its end
    symbol not counted, where all have as many.

    A `stage` is that of a curriculum: 0 is the whole task, any other is the longest length that problems may have.
    """

    version: ClassVar[int] = 1
    checks_half_problems: ClassVar[bool] = False
    checks_answers: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    labels: ClassVar[bool] = False
    packs_documents: bool = False
    least_first: bool = False
    closing: tuple[str, ...] = ()
    answer_tokens: int | None = None
    config: Any
    alphabet: Vocabulary
    max_length: int

    def size(self, split: Split) -> int | None:
        """Return the number of examples in `split`, or None when they never run out."""
        return None

    def staged(self, stage: int) -> "Task":
        """Return the task that `stage` of a curriculum draws from: this one for 0; made once and kept.

        Raises UserError when its problems cannot be limited to that length, or when that leaves the task whole.
        """
        if stage == 0:
            return self
        kept: dict[int, Task] = vars(self).setdefault("_stages", {})
        if stage not in kept:
            task = self.build_stage(stage)
            if task.max_length >= self.max_length:
                raise UserError(f"a stage of length {stage} is the whole task, which follows the last stage anyway")
            kept[stage] = task
        return kept[stage]

    def build_stage(self, stage: int) -> "Task":
        """Return a new task whose longest problems have the length `stage`."""
        return self.config.of_lengths(None, stage).build()

    def largest_shift(self) -> tuple[int, str]:
        """Return how many places before the prompt's last the answer can be begun at, and why at no earlier one.

        Begun k places earlier, k + 1 tokens come from one pass; token m of the answer is then told where all but the
        last k - m tokens of the prompt have been read.
        """
        return 0, f"a task of kind {self.config.kind!r} does not say what of its answers an unfinished prompt decides"

    def published(self, name: str) -> Sequence[Example]:
        """Return the problems of a test set that others published; UserError where the task has none of that name."""
        raise UserError(f"no test set {name!r}: task {self.config.kind!r} has none")

    def at_pair(self, first: int, second: int) -> "Task":
        """Return this task with numbers of exactly `first` and `second` digits; UserError when it has no two."""
        return self.config.of_pair(first, second).build()

    def at_length(self, length: int) -> "Task":
        """Return this task with problems of exactly `length`, also beyond its own; UserError when it has none."""
        return self.config.of_lengths(length, length).build()

    @abstractmethod
    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        """Return problem `index` of `split`: a pure function of (config, split, index, stage)."""

    def examples(self, split: Split, indices: np.ndarray, stage: int = 0) -> list[Example]:
        """Return the problems at `indices`, each equal to `example` of it; vectorised tasks override this."""
        return [self.example(split, int(index), stage) for index in indices]

    def tag_values(self, split: Split, indices: np.ndarray, stage: int = 0) -> dict[str, np.ndarray] | None:
        """Return the tags of the problems at `indices`, each as an array (B,); None where only `examples` knows them.

        Sums of a million problems are sliced by these, without a text of each: an answer of exactly the wanted tokens
        is then right unread, and a task whose `readings` or chain say more of an answer returns None.
        """
        return None

    @abstractmethod
    def canonical(self, example: Example) -> Hashable:
        """Return the key under which two examples are the same problem (sorted operands, for addition)."""

    @abstractmethod
    def verify(self, example: Example, text: str) -> Verdict:
        """Decide from `text`, what a model generated after the prompt, whether the problem is solved."""

    def readings(self, example: Example, text: str) -> dict[str, Verdict]:
        """Return what other published rules than `verify` make of `text`, by their names; none by default."""
        return {}

    def constant_answer(self) -> str | None:
        """Return the text that answers most training problems, which a model has to beat; None if none is known."""
        return None

    def steps(self, example: Example, text: str) -> list[Step]:
        """Return the chain-of-thought steps found in `text`, each checked on its own; none by default."""
        return []

    def answer_from_steps(self, example: Example, text: str) -> str | None:
        """Return the answer that the chain in `text` leads to, whether its steps are true or not; None without one."""
        return None

    def corrupt_step(self, example: Example, text: str, rng: np.random.Generator) -> str | None:
        """Return `text` with one step of its chain made to lead to another answer; None where there is no chain."""
        return None

    def readable(self, text: str) -> str:
        """Return `text`, written as the task writes, as a person would write it."""
        return text

    def parse(self, expression: str) -> Example:
        """Read a problem that a person typed; a half expression becomes a prompt with an empty answer.

        Raises UserError when `expression` holds characters or shapes that the task has no place for.
        """
        self.alphabet.encode(expression)
        return Example(prompt=expression, answer="")

    def regions(self, example: Example) -> list[int]:
        """Return the region of each token of prompt + answer; by default everything after the prompt is ANSWER."""
        prompt = len(self.alphabet.encode(example.prompt))
        return [PROMPT] * prompt + [ANSWER] * len(self.alphabet.encode(example.answer))

    def target_regions(self, example: Example) -> list[int]:
        """Return the region of each target of `encode`: by default that of the token that follows."""
        return self.regions(example)[1:]

    def encode(self, example: Example) -> tuple[list[int], list[int], list[float]]:
        """Return (tokens, targets, weights) of one example, each of the same length.

        By default next-token prediction: tokens are prompt + answer without the last, targets without the first.
        """
        # Apart, since a model reads the prompt alone: a symbol that reached from it into the answer would be lost.
        ids = self.alphabet.encode(example.prompt) + self.alphabet.encode(example.answer)
        weights = [float(region in (CHAIN, ANSWER)) for region in self.regions(example)[1:]]
        return ids[:-1], ids[1:], weights

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Encode `examples` one by one into a padded batch."""
        rows = [self.encode(example) for example in examples]
        regions = [self.target_regions(example) for example in examples]
        longest = max((len(tokens) for tokens, _, _ in rows), default=0)
        shape = (len(rows), longest)
        tokens_BT = np.full(shape, self.alphabet.pad_id, dtype=np.int64)
        targets_BT = np.full(shape, self.alphabet.pad_id, dtype=np.int64)
        weights_BT = np.zeros(shape, dtype=np.float32)
        regions_BT = np.full(shape, PAD, dtype=np.uint8)
        for b, ((tokens, targets, weights), region) in enumerate(zip(rows, regions, strict=True)):
            tokens_BT[b, : len(tokens)] = tokens
            targets_BT[b, : len(tokens)] = targets
            weights_BT[b, : len(tokens)] = weights
            regions_BT[b, : len(tokens)] = region
        lengths_B = np.array([len(tokens) for tokens, _, _ in rows], dtype=np.int64)
        prompts = [len(self.alphabet.encode(example.prompt)) for example in examples]
        return Batch(tokens_BT, targets_BT, weights_BT, regions_BT, lengths_B, np.array(prompts, dtype=np.int64))

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        """Return the problems at `indices` as one batch; vectorised tasks override this."""
        return self.collate(self.examples(split, indices, stage))

    def batch(self, split: Split, start: int, count: int, stage: int = 0) -> Batch:
        """Return problems start .. start+count-1 of `split` as one batch, equal to collating `example` of each."""
        return self.gather(split, np.arange(start, start + count), stage)

    def distinct(self, split: Split, count: int, stage: int = 0) -> np.ndarray:
        """Return the first `count` indices of `split` whose problems all differ; fewer when the split has fewer.

        Gives up after 20 draws a problem plus 1000 without a new one; the caller reports the number it got.
        """
        seen: set[Hashable] = set()
        chosen: list[int] = []
        index, stale, size = 0, 0, self.size(split)
        while len(chosen) < count and (size is None or index < size) and stale < 1000 + 20 * len(seen):
            key = self.canonical(self.example(split, index, stage))
            stale += 1
            if key not in seen:
                seen.add(key)
                chosen.append(index)
                stale = 0
            index += 1
        if not chosen:
            raise UserError(f"the {split} split has no problems")
        return np.array(chosen, dtype=np.int64)
