"""The problems that a model is asked, and its answers, as arrays of tokens; texts are written for those who read them.

Shapes: B problems, T tokens of the longest input, P tokens of the longest prompt, A tokens of the longest answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trivium.tasks.base import CHAIN, Batch, Example, Split, Task
from trivium.tasks.byte_pairs import Vocabulary


class Asked(ABC):
    """Problems in a fixed order. A row is a problem's place in it."""

    task: Task

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, start: int, stop: int) -> Batch:
        """Return the problems at rows `start` to `stop` - 1, encoded."""

    @abstractmethod
    def examples(self, rows: np.ndarray) -> list[Example]:
        """Return the problems at `rows` as texts."""

    @abstractmethod
    def tags(self) -> dict[str, np.ndarray] | None:
        """Return the values (B,) of each tag; None where they are known of examples alone."""


@dataclass(frozen=True)
class SplitAsked(Asked):
    """The problems at `indices` of a split."""

    task: Task
    split: Split
    indices: np.ndarray
    stage: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, start: int, stop: int) -> Batch:
        return self.task.gather(self.split, self.indices[start:stop], self.stage)

    def examples(self, rows: np.ndarray) -> list[Example]:
        return self.task.examples(self.split, self.indices[rows], self.stage)

    def tags(self) -> dict[str, np.ndarray] | None:
        return self.task.tag_values(self.split, self.indices, self.stage)


@dataclass(frozen=True)
class GivenAsked(Asked):
    """Problems that somebody wrote."""

    task: Task
    given: Sequence[Example]

    def __len__(self) -> int:
        return len(self.given)

    def batch(self, start: int, stop: int) -> Batch:
        return self.task.collate(self.given[start:stop])

    def examples(self, rows: np.ndarray) -> list[Example]:
        return [self.given[row] for row in rows]

    def tags(self) -> dict[str, np.ndarray] | None:
        return None


class Tokens:
    """The prompts and the wanted answers of batches that went by.

    Behind the tokens of a row's prompt or answer stand end symbols. `chained` says whether any target was of a chain
    of thought.
    """

    def __init__(self, end_id: int):
        self.end_id = end_id
        self.chained = False
        self._prompts: list[np.ndarray] = []
        self._wanted: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield `batches`, which continue their prompts, and keep what they hold."""
        for batch in batches:
            prompts_B, answers_B = batch.prompt_lengths_B, batch.lengths_B - batch.prompt_lengths_B + 1
            self._lengths.append(np.stack((prompts_B, answers_B)))
            place_P, place_A = (np.arange(int(lengths_B.max(initial=0))) for lengths_B in (prompts_B, answers_B))
            tokens_BP = batch.tokens_BT[:, : len(place_P)]
            self._prompts.append(np.where(place_P < prompts_B[:, None], tokens_BP, self.end_id))
            # The target of the prompt's last place is the first token of the answer.
            places_BA = np.clip(prompts_B[:, None] - 1 + place_A, 0, batch.targets_BT.shape[1] - 1)
            wanted_BA = np.take_along_axis(batch.targets_BT, places_BA, axis=1)
            self._wanted.append(np.where(place_A < answers_B[:, None], wanted_BA, self.end_id))
            self.chained = self.chained or bool((batch.regions_BT == CHAIN).any())
            yield batch

    def prompts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens (B, P), lengths (B,))."""
        return self._joined(self._prompts), np.concatenate([lengths[0] for lengths in self._lengths])

    def wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens (B, A), lengths (B,)), the end symbols included."""
        return self._joined(self._wanted), np.concatenate([lengths[1] for lengths in self._lengths])

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        width = max(part.shape[1] for part in parts)
        padded = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=self.end_id) for x in parts]
        return np.concatenate(padded)


class Answers(ABC):
    """What a model answered. A row is a problem's place among those asked."""

    as_wanted_B: np.ndarray  # bool: the answers that consist of the wanted tokens and nothing else
    generated: int  # tokens

    @abstractmethod
    def texts(self, rows: np.ndarray) -> list[str]:
        """Return the answers at `rows`, end symbols included if they came."""


class TokenAnswers(Answers):
    """Generated answers (B, N) of `counts_B` tokens, beside the wanted ones (B, A)."""

    def __init__(
        self,
        alphabet: Vocabulary,
        tokens_BN: np.ndarray,
        counts_B: np.ndarray,
        wanted_BA: np.ndarray,
        wanted_counts_B: np.ndarray,
    ):
        self.alphabet, self.tokens_BN, self.counts_B = alphabet, tokens_BN, counts_B
        width = min(tokens_BN.shape[1], wanted_BA.shape[1])
        same_BN = tokens_BN[:, :width] == wanted_BA[:, :width]
        same_BN |= np.arange(width) >= counts_B[:, None]
        # Answers of as many tokens end within both arrays.
        self.as_wanted_B = (counts_B == wanted_counts_B) & same_BN.all(axis=1)
        self.generated = int(counts_B.sum())

    def texts(self, rows: np.ndarray) -> list[str]:
        pairs = zip(self.tokens_BN[rows].tolist(), self.counts_B[rows].tolist(), strict=True)
        return [self.alphabet.decode(tokens[:count]) for tokens, count in pairs]


class LabelAnswers(Answers):
    """Labels of the places of prompts, written as texts; no token is generated."""

    def __init__(self, texts: list[str]):
        self._texts, self.generated = texts, 0
        self.as_wanted_B = np.zeros(len(texts), dtype=bool)

    def texts(self, rows: np.ndarray) -> list[str]:
        return [self._texts[row] for row in rows]
