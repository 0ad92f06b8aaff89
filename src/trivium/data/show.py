"""Problems laid open: each with its tokens, their position ids, and which of them the loss and the scores count."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trivium.config import UserError
from trivium.data.positions import block_ids, token_ids
from trivium.tasks.base import CHAIN, Example, Split, Task

Shown = Literal["block", "closing", "token"]
REGION_NAMES = ("prompt", "chain", "answer", "pad")


@dataclass(frozen=True)
class ShownToken:
    """One token of a problem: `position` is its position id, `scored` whether a model is trained to write it.

    In a task that labels what it reads `target` is the label to tell at this token, "" where there is none, and
    `scored` says whether there is one; elsewhere it is None, since the target is the token that follows.
    """

    text: str
    id: int
    position: int
    digit: bool
    region: str
    scored: bool
    target: str | None = None


@dataclass(frozen=True)
class ShownExample:
    """One problem and its tokens, the end symbol included; those of the prompt alone where they are labelled."""

    example: Example
    tokens: tuple[ShownToken, ...]

    @property
    def text(self) -> str:
        between = " " if any(token.target is not None for token in self.tokens) else ""
        return self.example.prompt + between + self.example.answer


def show_example(task: Task, example: Example, *, positions: Shown = "block", chain_loss: bool = True) -> ShownExample:
    """Return the tokens of one problem; `positions` names the ids: of runs of digits, also of the symbols that end
    a number of the prompt, or places in the sequence."""
    alphabet = task.alphabet
    targets: list[str | None]
    if task.labels:
        ids, labels, weights = task.encode(example)
        regions = task.regions(example)[: len(ids)]
        targets = [alphabet.symbols[label] if weight > 0 else "" for label, weight in zip(labels, weights, strict=True)]
    else:
        ids = alphabet.encode(example.prompt) + alphabet.encode(example.answer)
        regions = task.regions(example)
        weights = [0.0, *task.encode(example)[2]] if ids else []
        targets = [None] * len(ids)
    array = np.array(ids, dtype=np.int64)
    closing = tuple(map(alphabet.id_of, task.closing)) if positions == "closing" else ()
    places = token_ids(array) if positions == "token" else block_ids(array, alphabet.digit_ids, closing)
    tokens = [
        ShownToken(
            text=alphabet.symbols[index],
            id=index,
            position=int(place),
            digit=index in alphabet.digit_ids,
            region=REGION_NAMES[region],
            scored=weight > 0 and (chain_loss or region != CHAIN),
            target=target,
        )
        for index, place, region, weight, target in zip(ids, places, regions, weights, targets, strict=True)
    ]
    return ShownExample(example, tuple(tokens))


def show_examples(
    task: Task,
    split: Split,
    count: int,
    *,
    positions: Shown = "block",
    chain_loss: bool = True,
) -> list[ShownExample]:
    """Return the first `count` problems of `split`, or all of a smaller one."""
    if count < 1:
        raise UserError(f"count: expected 1 or more, got {count}")
    size = task.size(split)
    indices = range(count if size is None else min(count, size))
    return [
        show_example(task, task.example(split, index), positions=positions, chain_loss=chain_loss) for index in indices
    ]


def show_expression(
    task: Task, expression: str, *, positions: Shown = "block", chain_loss: bool = True
) -> ShownExample:
    """Return the problem that a person typed, such as `99+21`; UserError when the task has no place for it."""
    return show_example(task, task.parse(expression), positions=positions, chain_loss=chain_loss)
