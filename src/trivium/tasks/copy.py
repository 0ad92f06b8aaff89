"""Copying: a string, a sign, and the string once more. Shapes: B strings, P tokens of the longest prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import TASKS
from trivium.tasks.counter_random import below_high, words
from trivium.tasks.drawn import END, Drawn, DrawnConfig, DrawnTask, drawn_lengths

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LARGEST_VOCABULARY = 2**16


@TASKS.register("copy")
@dataclass(frozen=True)
class CopyConfig(DrawnConfig):
    """Uniform strings to be written again; a length counts the symbols of one string."""

    vocabulary: int = 16
    """Symbols that strings are made of."""
    backwards: bool = False
    """Write the string from its end."""

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.vocabulary <= LARGEST_VOCABULARY:
            raise UserError(f"vocabulary: expected 2 to {LARGEST_VOCABULARY}, got {self.vocabulary}")

    def make(self) -> "Copy":
        return Copy(self)

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["CopyConfig"]:
        return [
            cls(max_length=6),
            cls(vocabulary=300, min_length=2, max_length=5, backwards=True),
            cls(vocabulary=2, min_length=9, max_length=9, train_examples=40),
        ]


class Copy(DrawnTask):
    """Symbols are letters, or numbers in angle brackets where there are too few letters."""

    config: CopyConfig

    def __init__(self, config: CopyConfig):
        self.config = config
        numbered = config.vocabulary > len(LETTERS)
        symbols = [f"<{i}>" for i in range(config.vocabulary)] if numbered else LETTERS[: config.vocabulary]
        self.alphabet = Alphabet((*symbols, "=", END), end=END, pad=END)
        self.sign = self.alphabet.id_of("=")
        self.prompt_room = config.max_length + 1
        self.max_length = 2 * config.max_length + 2

    def count(self, length: int) -> int:
        return self.config.vocabulary**length

    def propose(self, states_B: np.ndarray) -> Drawn:
        words_WB = words(states_B, 0, self.prompt_room)
        lengths_B = drawn_lengths(words_WB[0], self.config.min_length, self.config.max_length)
        strings_BA = below_high(words_WB[1:], self.config.vocabulary).T.astype(np.int64)
        prompts_BP = np.zeros((len(states_B), self.prompt_room), dtype=np.int64)
        prompts_BP[:, :-1] = strings_BA
        prompts_BP[np.arange(len(states_B)), lengths_B] = self.sign
        if self.config.backwards:
            place_A = np.arange(strings_BA.shape[1])
            strings_BA = np.take_along_axis(strings_BA, np.maximum(lengths_B[:, None] - 1 - place_A, 0), axis=1)
        return Drawn(prompts_BP, lengths_B + 1, strings_BA, lengths_B)

    def solve(self, prompt: list[int]) -> list[int]:
        string = prompt[:-1]
        if not string or prompt[-1] != self.sign or max(string) >= self.sign:
            raise UserError(f"expected a string and =, such as {self.alphabet.symbols[0]}=")
        return string[::-1] if self.config.backwards else string

    def tags(self, prompt: list[int]) -> dict[str, int | str]:
        return {"length": len(prompt) - 1}
