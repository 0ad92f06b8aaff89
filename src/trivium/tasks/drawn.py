"""What generated tasks of some length share: drawing by counters, splits by hash, and encoding of whole batches.

Shapes: B problems, P tokens of the longest prompt, A tokens of the longest answer, T tokens of the longest input.
"""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from trivium.registry import UserError
from trivium.tasks.answers import strip_end
from trivium.tasks.base import ANSWER, CHAIN, PAD, PROMPT, SPLITS, Batch, Example, Split, Task, TaskConfig, Verdict
from trivium.tasks.blocks import Blocks
from trivium.tasks.counter_random import GOLDEN, key, mix

END = "<end>"
COUNTED = 2**16  # spaces of at most so many problems are looked into before they are drawn from
PROBES = 2**14  # problems that this takes
ATTEMPTS = 2**17  # more than any split that passes needs
CELLS = 2**20  # tokens held at once while drawing, and problems looked at together
SMALLEST_FRACTION = 0.001
LONGEST = 2**16


@dataclass(frozen=True)
class DrawnConfig(TaskConfig):
    """Problems of min_length to max_length, every length equally likely."""

    min_length: int = 1
    """Length of the shortest problem."""
    max_length: int = 18
    """Length of the longest problem."""
    train_examples: int | None = None
    """Size of a finite training set; null never runs out of problems."""
    validation_fraction: float = 0.05
    """Share of all problems kept for validation."""
    test_fraction: float = 0.05
    """Share of all problems kept for the final test."""
    seed: int = 0
    """Seed of the problems that are drawn; which split a problem belongs to does not depend on it."""

    def __post_init__(self):
        shortest = self.shortest_length()
        if self.min_length < shortest:
            raise UserError(f"min_length: expected {shortest} or more, got {self.min_length}")
        if not self.min_length <= self.max_length <= LONGEST:
            raise UserError(f"max_length: expected min_length ({self.min_length}) to {LONGEST}, got {self.max_length}")
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

    def shortest_length(self) -> int:
        """Return the least length that a problem can have."""
        return 1

    @abstractmethod
    def make(self) -> "DrawnTask":
        """Return the task, its splits not yet looked into."""

    def build(self) -> "DrawnTask":
        task = self.make()
        task.check_splits(SPLITS)
        return task

    def of_lengths(self, shortest: int | None, longest: int) -> Self:
        shortest = self.min_length if shortest is None else shortest
        if not self.shortest_length() <= shortest <= longest <= LONGEST:
            raise UserError(
                f"length {longest}: expected {max(self.shortest_length(), shortest)} to {LONGEST} for this task"
            )
        return replace(self, min_length=shortest, max_length=longest)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["DrawnConfig"]:
        return [cls()]


@dataclass(frozen=True)
class Drawn:
    """Problems as arrays. What lies behind a row's length is 0 and means nothing.

    `answers_BA` is what follows the prompt, or, of a task that labels what it reads, the label of each place (A = P)
    with -1 where there is none to predict. Without it, the task finds the answers from the prompts when asked.
    """

    prompts_BP: np.ndarray  # int64
    lengths_B: np.ndarray  # int64, tokens of each prompt
    answers_BA: np.ndarray | None = None  # int64
    answer_lengths_B: np.ndarray | None = None  # int64

    def rows(self, rows: np.ndarray) -> "Drawn":
        """Return some of the problems."""
        if self.answers_BA is None or self.answer_lengths_B is None:
            return Drawn(self.prompts_BP[rows], self.lengths_B[rows])
        return Drawn(self.prompts_BP[rows], self.lengths_B[rows], self.answers_BA[rows], self.answer_lengths_B[rows])


def joined(parts: Sequence[Drawn]) -> Drawn:
    """Return the problems of all `parts`, which have the same widths, one after the other."""
    if len(parts) == 1:
        return parts[0]
    answers = [part.answers_BA for part in parts if part.answers_BA is not None]
    answer_lengths = [part.answer_lengths_B for part in parts if part.answer_lengths_B is not None]
    return Drawn(
        np.concatenate([part.prompts_BP for part in parts]),
        np.concatenate([part.lengths_B for part in parts]),
        np.concatenate(answers) if answers else None,
        np.concatenate(answer_lengths) if answer_lengths else None,
    )


class DrawnTask(Task):
    """Draw problems by counter: attempt t of problem i is keyed by (seed, split, i, t), and the first that lies in
    the split is taken. A problem lies where a mixing hash of its prompt falls, whatever the seed or the lengths.

    Subclasses set `alphabet`, `max_length` and `prompt_room`, the most tokens of a prompt, and give `propose`,
    `solve`, `tags` and `count`.
    """

    prompt_room: int
    _SPLIT_KEYS: ClassVar[dict[Split, int]] = {"train": 1, "validation": 2, "test": 3}

    @abstractmethod
    def propose(self, states_B: np.ndarray) -> Drawn:
        """Return one problem from each random stream, prompts and answers as wide as the longest that there are."""

    @abstractmethod
    def solve(self, prompt: list[int]) -> list[int]:
        """Return the answer's tokens, without the end symbol; UserError when `prompt` is no problem of the task.

        This reads one prompt token by token, apart from what `propose` and `answer` do with arrays.
        """

    @abstractmethod
    def tags(self, prompt: list[int]) -> dict[str, int | str]:
        """Return what slices the scores of this problem."""

    @abstractmethod
    def count(self, length: int) -> int:
        """Return how many problems of `length` there are, or at least so many when that is hard to say."""

    @cached_property
    def _checked(self) -> set[Split]:
        return set()

    def answer(self, problems: Drawn) -> tuple[np.ndarray, np.ndarray]:
        """Return (answers_BA, answer lengths) of drawn problems, as `Drawn` has them."""
        assert problems.answers_BA is not None
        assert problems.answer_lengths_B is not None
        return problems.answers_BA, problems.answer_lengths_B

    def hashes(self, problems: Drawn) -> np.ndarray:
        """Return the uint64 hash (B,) that says which split a problem belongs to: equal for equal `canonical`."""
        return prompt_hashes(problems)

    def chain_lengths(self, problems: Drawn) -> np.ndarray:
        """Return how many tokens (B,) of each answer are a chain of thought; none by default."""
        return np.zeros_like(problems.lengths_B)

    def size(self, split: Split) -> int | None:
        return self.config.train_examples if split == "train" else None

    def build_stage(self, stage: int) -> "DrawnTask":
        task = self.config.of_lengths(None, stage).make()
        task.check_splits(
            ("train", "validation")
        )  # short problems may be too few for a test split, which has no stages
        return task

    def at_length(self, length: int) -> "DrawnTask":
        task = self.config.of_lengths(length, length).make()
        task.check_splits(("test",))
        return task

    def check_splits(self, splits: Sequence[Split]) -> None:
        """Raise UserError when one of `splits` has no problems, which a search would not find out."""
        splits = [split for split in splits if split not in self._checked]
        if not splits:
            return
        total = 0
        for length in range(self.config.min_length, self.config.max_length + 1):
            total += self.count(length)
            if total > COUNTED:
                self._checked.update(splits)
                return
        hashes = np.unique(self.hashes(self.propose(mix(np.arange(PROBES, dtype=np.uint64) + GOLDEN))))
        for split in splits:
            if not self._within(hashes, split).any():
                raise UserError(
                    f"the {split} split is empty: there are only {len(hashes)} problems of lengths "
                    f"{self.config.min_length} to {self.config.max_length}; allow longer ones or a larger fraction"
                )
            self._checked.add(split)

    def _within(self, hashes_B: np.ndarray, split: Split) -> np.ndarray:
        """Return which hashes fall in `split`: the lowest go to test, the next to validation, the rest to train."""
        test = np.uint64(self.config.test_fraction * 2.0**64)
        held_out = np.uint64((self.config.test_fraction + self.config.validation_fraction) * 2.0**64)
        if split == "test":
            return hashes_B < test
        return hashes_B >= held_out if split == "train" else (hashes_B >= test) & (hashes_B < held_out)

    def draw(self, split: Split, indices_B: np.ndarray) -> Drawn:
        """Return the problems at `indices_B` of `split`."""
        self.check_splits((split,))
        most = max(1, CELLS // self.prompt_room)
        parts = [self._draw(split, indices_B[start : start + most], most) for start in range(0, len(indices_B), most)]
        return joined(parts or [self.propose(np.zeros(0, dtype=np.uint64))])

    def _draw(self, split: Split, indices_B: np.ndarray, most: int) -> Drawn:
        streams_B = mix(key(self.config.seed, self._SPLIT_KEYS[split]) + mix(indices_B.astype(np.uint64) + GOLDEN))
        share = {"validation": self.config.validation_fraction, "test": self.config.test_fraction}.get(split, 1.0)
        parts, places = [], []
        pending, attempt = np.arange(len(indices_B)), 0
        while len(pending):
            if attempt > ATTEMPTS:
                raise UserError(f"the {split} split has too few problems to draw from; give it a larger fraction")
            # How many attempts are made side by side changes nothing: the first that lies in the split is taken.
            tries = max(1, min(int(1 / share), most // len(pending)))
            counters = np.arange(attempt + 1, attempt + 1 + tries, dtype=np.uint64) * GOLDEN
            proposed = self.propose(mix(streams_B[pending][:, None] + counters).ravel())
            taken = self._within(self.hashes(proposed), split).reshape(-1, tries)
            hit = taken.any(axis=1)
            parts.append(proposed.rows(np.flatnonzero(hit) * tries + taken.argmax(axis=1)[hit]))
            places.append(pending[hit])
            pending = pending[~hit]
            attempt += tries
        order = np.argsort(np.concatenate(places))
        return joined(parts).rows(order)

    def example_of(self, prompt: list[int]) -> Example:
        """Return the problem that `prompt`, token ids, poses; UserError when it is none."""
        answer = self.alphabet.decode(self.solve(prompt)) + self.alphabet.end
        return Example(self.alphabet.decode(prompt), answer, self.tags(prompt))

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        return self.examples(split, np.array([index]), stage)[0]

    def examples(self, split: Split, indices: np.ndarray, stage: int = 0) -> list[Example]:
        problems = self._of_stage(stage).draw(split, np.asarray(indices, dtype=np.int64))
        rows = zip(problems.prompts_BP.tolist(), problems.lengths_B.tolist(), strict=True)
        return [self.example_of(prompt[:length]) for prompt, length in rows]

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        return self._of_stage(stage)._blocks.batch(split, np.asarray(indices, dtype=np.int64))

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self.max_length, self._encoded)

    def _encoded(self, split: Split, indices_B: np.ndarray) -> Batch:
        problems = self.draw(split, indices_B)
        return self._labelled(problems) if self.labels else self._continued(problems)

    def _of_stage(self, stage: int) -> "DrawnTask":
        task = self.staged(stage)
        assert isinstance(task, DrawnTask)
        return task

    def distinct(self, split: Split, count: int, stage: int = 0) -> np.ndarray:
        task, size = self._of_stage(stage), self.size(split)
        chosen: list[int] = []
        seen: set[int] = set()
        start, stale = 0, 0
        while len(chosen) < count and (size is None or start < size):
            stop = start + min(max(64, count - len(chosen)), CELLS)
            indices = np.arange(start, stop if size is None else min(stop, size))
            # Two problems of one 64-bit hash would count as one: 100,000 problems lose one with a chance of 3e-10.
            for index, found in zip(indices.tolist(), task.hashes(task.draw(split, indices)).tolist(), strict=True):
                if len(chosen) == count or stale >= 1000 + 20 * len(seen):  # as Task.distinct
                    return np.array(chosen, dtype=np.int64)
                stale += 1
                if found not in seen:
                    seen.add(found)
                    chosen.append(index)
                    stale = 0
            start = int(indices[-1]) + 1
        return np.array(chosen, dtype=np.int64)

    def _labelled(self, problems: Drawn) -> Batch:
        """Encode problems whose answers are the labels of the places that are read."""
        labels_BP = self.answer(problems)[0]
        lengths_B = problems.lengths_B
        longest = int(lengths_B.max(initial=0))
        inside_BT = np.arange(longest) < lengths_B[:, None]
        labels_BT = labels_BP[:, :longest]
        scored_BT = inside_BT & (labels_BT >= 0)
        pad = self.alphabet.pad_id
        return Batch(
            np.where(inside_BT, problems.prompts_BP[:, :longest], pad),
            np.where(scored_BT, labels_BT, pad),
            scored_BT.astype(np.float32),
            np.where(scored_BT, ANSWER, PAD).astype(np.uint8),
            lengths_B.copy(),
            lengths_B.copy(),
        )

    def _continued(self, problems: Drawn) -> Batch:
        """Encode problems whose answers follow the prompt, with the end symbol behind."""
        answers_BA, answer_lengths_B = self.answer(problems)
        prompts_B, totals_B = problems.lengths_B, problems.lengths_B + answer_lengths_B + 1
        longest = int(totals_B.max(initial=1))
        ids_BT = np.full((len(totals_B), longest), self.alphabet.pad_id, dtype=np.int64)
        place_T = np.arange(longest)
        prompt_BT = place_T < prompts_B[:, None]
        answer_BT = ~prompt_BT & (place_T < (totals_B - 1)[:, None])
        ids_BT[prompt_BT] = problems.prompts_BP[np.arange(problems.prompts_BP.shape[1]) < prompts_B[:, None]]
        ids_BT[answer_BT] = answers_BA[np.arange(answers_BA.shape[1]) < answer_lengths_B[:, None]]
        ids_BT[np.arange(len(totals_B)), totals_B - 1] = self.alphabet.end_id
        answer_BT |= place_T == (totals_B - 1)[:, None]
        regions_BT = np.where(prompt_BT, PROMPT, np.where(answer_BT, ANSWER, PAD)).astype(np.uint8)
        chain_BT = ~prompt_BT & (place_T < (prompts_B + self.chain_lengths(problems))[:, None])
        regions_BT[chain_BT] = CHAIN
        regions_BT = regions_BT[:, 1:]
        inside_BT = place_T[:-1] < (totals_B - 1)[:, None]
        return Batch(
            np.where(inside_BT, ids_BT[:, :-1], self.alphabet.pad_id),
            ids_BT[:, 1:],
            ((regions_BT == ANSWER) | (regions_BT == CHAIN)).astype(np.float32),
            regions_BT,
            totals_B - 1,
            prompts_B.copy(),
        )

    def label_places(self, prompt: list[int]) -> list[bool]:
        """Return which places of the prompt have a label, in a task that labels what it reads; by default all."""
        return [True] * len(prompt)

    def target_regions(self, example: Example) -> list[int]:
        if not self.labels:
            return super().target_regions(example)
        return [ANSWER if labelled else PAD for labelled in self.label_places(self.alphabet.encode(example.prompt))]

    def encode(self, example: Example) -> tuple[list[int], list[int], list[float]]:
        if not self.labels:
            return super().encode(example)
        tokens = self.alphabet.encode(example.prompt)
        answer = self.alphabet.encode(example.answer)[:-1]
        places = self.label_places(tokens)
        if sum(places) != len(answer):
            raise UserError(
                f"problem {example.prompt!r} has {sum(places)} places to label, its answer has {len(answer)} symbols"
            )
        labels = iter(answer)
        targets = [next(labels) if labelled else self.alphabet.pad_id for labelled in places]
        return tokens, targets, [float(labelled) for labelled in places]

    def canonical(self, example: Example) -> Hashable:
        return example.prompt

    def parse(self, expression: str) -> Example:
        """Read a problem that a person typed, blanks between its symbols or not."""
        return self.example_of(self.alphabet.encode("".join(expression.split())))

    def verify(self, example: Example, text: str) -> Verdict:
        """Decide whether `text` is the answer and nothing but it, end symbol included.

        A prompt left in front of it is taken off, unless `text` is right as it stands; labels have none in front.
        """
        wanted = strip_end(self.alphabet, example.answer)[0]
        body, ended = strip_end(self.alphabet, text)
        if not self.labels and body != wanted:
            body = body.removeprefix(example.prompt)
        if not ended:
            return Verdict(False, body or None, "the answer does not end")
        return Verdict(True, body) if body == wanted else Verdict(False, body, f"{wanted} is right")


def prompt_hashes(problems: Drawn) -> np.ndarray:
    """Return a uint64 hash (B,) of each prompt that does not depend on how wide the array is."""
    place_P = np.arange(1, problems.prompts_BP.shape[1] + 1, dtype=np.uint64)
    mixed_BP = mix(problems.prompts_BP.astype(np.uint64) + mix(place_P))
    mixed_BP *= np.arange(problems.prompts_BP.shape[1]) < problems.lengths_B[:, None]
    return mix(mixed_BP.sum(axis=1, dtype=np.uint64) + problems.lengths_B.astype(np.uint64))


def drawn_lengths(words_B: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    """Return lengths (int64) that are uniform from `shortest` to `longest`, one from each random word."""
    span = np.uint64(longest - shortest + 1)
    return (((words_B >> np.uint64(32)) * span) >> np.uint64(32)).astype(np.int64) + shortest


def drawn_order(words_BN: np.ndarray, ready_BN: np.ndarray | None = None) -> np.ndarray:
    """Return a random order (B, N) of the columns of each row, those where `ready_BN` is false last."""
    keys_BN = words_BN if ready_BN is None else np.where(ready_BN, words_BN >> np.uint64(1), np.uint64(2**64 - 1))
    return np.argsort(keys_BN, axis=1, kind="stable")
