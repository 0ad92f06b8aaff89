"""A language model that does what a test tells it to: its logits are a function of all tokens so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trivium.mixers.base import State
from trivium.model.base import LanguageModel, ModelContext
from trivium.tasks.addition import Addition
from trivium.tasks.base import Example


@dataclass
class Tape(State):
    tokens_BT: Tensor
    length_B: Tensor


class ScriptedModel(LanguageModel):
    """`script(history)` returns the V logits of the next token, or one token id that then has all the probability."""

    def __init__(self, script: Callable[[tuple[int, ...]], Any], vocab_size: int, max_length: int):
        super().__init__()
        self.script = script
        self.config = None
        self.context = ModelContext(vocab_size=vocab_size, max_length=max_length)
        self.rows_read: list[int] = []  # rows that each call really read
        self.tokens_read = 0

    def init_state(
        self,
        batch: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tape:
        room = max_length or self.context.max_length
        return Tape(torch.zeros(batch, room, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64))

    def forward(
        self,
        tokens_BT: Tensor,
        state: Any = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        rows, new = tokens_BT.shape
        lengths = [new] * rows if lengths_B is None else lengths_B.tolist()
        logits_BTV = torch.full((rows, new, self.context.vocab_size), float("nan"))
        for b, length in enumerate(lengths):
            past = [] if state is None else state.tokens_BT[b, : state.length_B[b]].tolist()
            history = past + tokens_BT[b, :length].tolist()
            if len(history) > self.context.max_length:
                raise ValueError("the tokens do not fit")
            for t in range(length):
                logits_BTV[b, t] = self._logits(history[: len(past) + t + 1])
            if state is not None:
                state.tokens_BT[b, : len(history)] = torch.tensor(history, dtype=torch.int64)
                state.length_B[b] = len(history)
        self.rows_read.append(sum(length > 0 for length in lengths))
        self.tokens_read += sum(lengths)
        return logits_BTV, state

    def _logits(self, history: Sequence[int]) -> Tensor:
        told = self.script(tuple(history))
        if isinstance(told, int):
            logits = torch.full((self.context.vocab_size,), -100.0)
            logits[told] = 100.0
            return logits
        return torch.as_tensor(told, dtype=torch.float32)


def solver(task: Addition, write: Callable[[Example, str], str], max_length: int | None = None) -> ScriptedModel:
    """A model that reads the sum in its prompt and writes `write(example, written so far)`, symbol by symbol.

    `example` is the problem with its right answer. What `write` returns has as many symbols as were written, and
    the next. Before the prompt is complete it completes half problems with the operand 1.
    """
    alphabet = task.alphabet

    @cache
    def problem(text: str) -> Example | None:
        try:
            operands, complete = task.notation.read_prompt(text)
        except ValueError:
            return None
        return task.example_of(operands) if complete else None

    @cache
    def script(history: tuple[int, ...]) -> int:
        text = alphabet.decode(list(history))
        for end in range(1, len(text) + 1):
            example = problem(text[:end])
            if example is not None:
                written = alphabet.encode(text[end:])
                wanted = alphabet.encode(write(example, text[end:]))
                return wanted[len(written)] if len(written) < len(wanted) else alphabet.end_id
        return alphabet.id_of("1" if text.endswith("+") else "+" if text.count("+") == 0 else task.notation.finish)

    return ScriptedModel(script, len(alphabet), max_length or task.max_length)
