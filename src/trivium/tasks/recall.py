"""Multi-query associative recall (MQAR): pairs of a key and a value, then keys whose values are to be told.

Source: "Zoology", arXiv 2312.04927, appendix E; here fillers are never keys, so that a key behind the pairs is always a
query. Shapes: B problems, P tokens of the longest, N pairs or queries, G places behind the pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import TASKS
from trivium.tasks.counter_random import below_high, unit, words
from trivium.tasks.drawn import END, Drawn, DrawnConfig, DrawnTask, drawn_lengths, drawn_order

LARGEST_VOCABULARY = 2**16


@TASKS.register("recall")
@dataclass(frozen=True)
class RecallConfig(DrawnConfig):
    """Keys and values, then queries among fillers; the value is labelled at each query. A length counts tokens."""

    min_length: int = 64
    """Tokens of the shortest problem."""
    max_length: int = 64
    """Tokens of the longest problem."""
    vocabulary: int = 8192
    """Symbols, one half keys and the other values; fillers are values too."""
    pairs: int = 4
    """Pairs of a key and a value at the beginning."""
    queries: int | None = None
    """Keys asked for, each once (default: all)."""
    gap_power: float = 0.01
    """A query comes g places behind the pairs with a chance proportional to g^(gap_power - 1); 1 is uniform."""

    def __post_init__(self):
        if not 4 <= self.vocabulary <= LARGEST_VOCABULARY or self.vocabulary % 2:
            raise UserError(f"vocabulary: expected an even number, 4 to {LARGEST_VOCABULARY}, got {self.vocabulary}")
        if not 1 <= self.pairs <= self.vocabulary // 2:
            raise UserError(f"pairs: expected 1 to {self.vocabulary // 2}, the keys that there are, got {self.pairs}")
        if self.queries is not None and not 1 <= self.queries <= self.pairs:
            raise UserError(f"queries: expected 1 to {self.pairs}, the pairs that there are, got {self.queries}")
        if not 0 < self.gap_power <= 100:
            raise UserError(f"gap_power: expected more than 0, up to 100, got {self.gap_power}")
        super().__post_init__()

    def shortest_length(self) -> int:
        return 2 * self.pairs + (self.queries or self.pairs)

    def make(self) -> "Recall":
        return Recall(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["RecallConfig"]:
        return [
            cls(vocabulary=64, min_length=16, max_length=16),
            cls(vocabulary=512, min_length=20, max_length=40, pairs=5, queries=3, gap_power=1.0),
            cls(vocabulary=8, min_length=3, max_length=3, pairs=1, validation_fraction=0.2, test_fraction=0.2),
        ]


class Recall(DrawnTask):
    """Key i has the id i, value i the id vocabulary / 2 + i."""

    labels = True
    config: RecallConfig

    def __init__(self, config: RecallConfig):
        self.config = config
        self.half = config.vocabulary // 2
        self.queries = config.queries or config.pairs
        keys, values = ([f"{letter}{i}" for i in range(self.half)] for letter in "kv")
        self.alphabet = Alphabet((*keys, *values, END), end=END, pad=END)
        self.prompt_room = config.max_length
        self.max_length = config.max_length + 1

    def count(self, length: int) -> int:
        # Only the values and the fillers are counted, each of which is drawn freely.
        return self.half ** (length - self.config.pairs - self.queries)

    def propose(self, states_B: np.ndarray) -> Drawn:
        config, pairs, room = self.config, self.config.pairs, self.prompt_room
        behind = room - 2 * pairs
        words_WB = words(states_B, 0, 1 + 4 * pairs + 2 * behind)
        lengths_B = drawn_lengths(words_WB[0], config.min_length, config.max_length)
        key_words, value_words, order_words, asked_words, filler_words, gap_words = np.split(
            words_WB[1:], np.cumsum([pairs, pairs, pairs, pairs, behind])
        )
        prompts_BP = np.zeros((len(states_B), room), dtype=np.int64)
        order_BN = drawn_order(np.ascontiguousarray(order_words.T))
        keys_BN = np.take_along_axis(distinct_below(key_words, self.half).T, order_BN, axis=1)
        values_BN = below_high(value_words, self.half).T.astype(np.int64) + self.half
        prompts_BP[:, 0 : 2 * pairs : 2] = keys_BN
        prompts_BP[:, 1 : 2 * pairs : 2] = values_BN
        prompts_BP[:, 2 * pairs :] = below_high(filler_words, self.half).T.astype(np.int64) + self.half
        # The smallest of exponential times at rates w are a draw without replacement with weights w.
        times_BG = -np.log1p(-unit(gap_words.T)) / np.arange(1, behind + 1) ** (config.gap_power - 1)
        times_BG[np.arange(behind) >= (lengths_B - 2 * pairs)[:, None]] = np.inf
        places_BN = np.argsort(times_BG, axis=1, kind="stable")[:, : self.queries] + 2 * pairs
        # Places come by their times, so that the pairs' own order would tell which is asked for where.
        asked_BN = drawn_order(np.ascontiguousarray(asked_words.T))[:, : self.queries]
        np.put_along_axis(prompts_BP, places_BN, np.take_along_axis(keys_BN, asked_BN, axis=1), axis=1)
        prompts_BP[np.arange(room) >= lengths_B[:, None]] = 0
        return Drawn(prompts_BP, lengths_B)

    def answer(self, problems: Drawn) -> tuple[np.ndarray, np.ndarray]:
        prompts_BP, first = problems.prompts_BP, 2 * self.config.pairs
        keys_BN, values_BN = prompts_BP[:, 0:first:2], prompts_BP[:, 1:first:2]
        order_BN = keys_BN.argsort(axis=1)
        labels_BP = np.full(prompts_BP.shape, -1, dtype=np.int64)
        rest_BG = prompts_BP[:, first:]
        inside_BG = np.arange(rest_BG.shape[1]) + first < problems.lengths_B[:, None]
        rows, places = np.nonzero((rest_BG < self.half) & inside_BG)
        # All rows' keys make one ascending sequence, each row's behind the row before.
        sorted_keys = np.take_along_axis(keys_BN, order_BN, axis=1) + self.half * np.arange(len(keys_BN))[:, None]
        found = np.searchsorted(sorted_keys.ravel(), rest_BG[rows, places] + self.half * rows)
        labels_BP[rows, places + first] = np.take_along_axis(values_BN, order_BN, axis=1).ravel()[found]
        return labels_BP, problems.lengths_B

    def label_places(self, prompt: list[int]) -> list[bool]:
        return [place >= 2 * self.config.pairs and token < self.half for place, token in enumerate(prompt)]

    def solve(self, prompt: list[int]) -> list[int]:
        head, rest = prompt[: 2 * self.config.pairs], prompt[2 * self.config.pairs :]
        value_of = dict(zip(head[::2], head[1::2], strict=False))
        asked = [token for token in rest if token < self.half]
        whole = len(value_of) == self.config.pairs and len(head) == 2 * self.config.pairs
        if not whole or any(not self.half <= value < 2 * self.half for value in head[1::2]):
            raise UserError(
                f"expected {self.config.pairs} pairs of different keys and their values, such as k1v2, and then queries"
            )
        if not asked or any(query not in value_of for query in asked) or self.alphabet.end_id in prompt:
            raise UserError("expected, behind the pairs, one or more of their keys, and values as fillers")
        return [value_of[query] for query in asked]

    def tags(self, prompt: list[int]) -> dict[str, int | str]:
        return {"length": len(prompt), "pairs": self.config.pairs}


def distinct_below(words_NB: np.ndarray, bound: int) -> np.ndarray:
    """Return N different integers (N, B) below `bound` from each stream, every set of them equally likely.

    Source: R. Floyd, in J. Bentley, "Programming Pearls", CACM 30 (1987) 754. The order within a set is not uniform.
    """
    count = len(words_NB)
    chosen_NB = np.zeros(words_NB.shape, dtype=np.int64)
    for row, top in enumerate(range(bound - count, bound)):
        drawn_B = below_high(words_NB[row], top + 1).astype(np.int64)
        taken_B = (chosen_NB[:row] == drawn_B).any(axis=0)
        chosen_NB[row] = np.where(taken_B, top, drawn_B)
    return chosen_NB
