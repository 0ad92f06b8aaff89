"""Words over a finite group: at every place the product of all elements so far is to be told (state tracking).

With S5 and A5, which are not solvable, one layer of most parallel mixers cannot do this for words of any length
(arXiv 2404.08819). Shapes: B words, P elements of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import TASKS, Example
from trivium.tasks.counter_random import below_high, words
from trivium.tasks.drawn import END, Drawn, DrawnConfig, DrawnTask, drawn_lengths
from trivium.tasks.groups import group

START = "<start>"


@TASKS.register("group_words")
@dataclass(frozen=True)
class GroupWordsConfig(DrawnConfig):
    """Uniform words over a group, the running product labelled at every place; a length counts elements."""

    group: str = "S5"
    """Group by name: S2 to S6, A3 to A6, Zn (Z2 is parity), and direct products such as Z2xS3."""
    start: bool = False
    """Put a symbol without a label before each word, from which a memory has something to turn."""

    def __post_init__(self):
        super().__post_init__()
        group(self.group)

    def make(self) -> "GroupWords":
        return GroupWords(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["GroupWordsConfig"]:
        return [
            cls(group="S5"),
            cls(group="Z2", max_length=12),
            cls(group="Z2xS3", min_length=3, max_length=3),
            cls(group="A5", max_length=7, train_examples=50),
            cls(group="Z12", max_length=9, seed=3),
            cls(group="S3", min_length=3, max_length=8, start=True),
        ]


class GroupWords(DrawnTask):
    """Words over a group. Splits are by whole words: a word of one split may begin as a word of another does."""

    labels = True
    config: GroupWordsConfig

    def __init__(self, config: GroupWordsConfig):
        self.config = config
        self.group = group(config.group)
        self.before = int(config.start)  # symbols before a word
        symbols = (*self.group.symbols, END, *[START] * self.before)
        self.alphabet = Alphabet(symbols, end=END, pad=END)
        self.prompt_room = self.before + config.max_length
        self.max_length = self.prompt_room + 1

    def count(self, length: int) -> int:
        return self.group.order**length

    def propose(self, states_B: np.ndarray) -> Drawn:
        words_WB = words(states_B, 0, 1 + self.config.max_length)
        lengths_B = drawn_lengths(words_WB[0], self.config.min_length, self.config.max_length)
        elements_BP = np.ascontiguousarray(below_high(words_WB[1:], self.group.order).T).astype(np.int64)
        elements_BP = np.pad(elements_BP, ((0, 0), (self.before, 0)), constant_values=self.start_id)
        return Drawn(elements_BP, lengths_B + self.before)

    def answer(self, problems: Drawn) -> tuple[np.ndarray, np.ndarray]:
        labels_PB = problems.prompts_BP.T.copy()
        table, order = self.group.table.ravel(), self.group.order
        labels_PB[: self.before] = -1
        for place in range(self.before + 1, len(labels_PB)):
            labels_PB[place] = table[labels_PB[place - 1] * order + labels_PB[place]]
        return labels_PB.T, problems.lengths_B

    def solve(self, prompt: list[int]) -> list[int]:
        word = prompt[self.before :]
        if prompt[: self.before] != [self.start_id] * self.before or not word or max(word) >= self.group.order:
            wanted, shown = START * self.before + self.group.symbols[-1] * 2, self.alphabet.decode(prompt)
            raise UserError(f"expected a word of elements such as {wanted}, got {shown!r}")
        products, so_far = [], 0
        for element in word:
            so_far = int(self.group.table[so_far, element])
            products.append(so_far)
        return products

    def tags(self, prompt: list[int]) -> dict[str, int | str]:
        return {"length": len(prompt) - self.before}

    def label_places(self, prompt: list[int]) -> list[bool]:
        return [place >= self.before for place in range(len(prompt))]

    def parse(self, expression: str) -> Example:
        typed = "".join(expression.split())
        return super().parse(typed if typed.startswith(START) else START * self.before + typed)

    @property
    def start_id(self) -> int:
        """The id of the symbol before a word, where there is one: the last."""
        return self.group.order + 1
