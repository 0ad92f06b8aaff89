"""The language model contract: token ids to logits, with the same streaming state as the mixers.

Shapes: B rows, T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.mixers.base import State
from trivium.mixers.cache import autocast_dtype
from trivium.registry import Registry, UserError
from trivium.tasks.base import Batch, Task
from trivium.tasks.shortened import Backwards, without_chain

MODELS = Registry("model", "trivium.model")

# What another kind of model keeps, where it has a knob of that name. Layers and positions are each kind's own.
_SHARED = ("width", "heads", "feedforward", "norm", "tied", "dropout", "max_length", "backends")


@dataclass(frozen=True)
class ModelContext:
    """What a task tells the model: vocabulary size, the longest sequence in tokens, which ids are digits, whether every
    number is written least significant digit first, and which ids end a number of the prompt (but not the last)."""

    vocab_size: int
    max_length: int
    digit_ids: tuple[int, ...] = ()
    least_first: bool = False
    closing_ids: tuple[int, ...] = ()
    backends: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig(ABC):
    """Base of every model's config. `num_params` counts each tied tensor once; FLOPs as in MixerConfig."""

    registry: ClassVar[Registry] = MODELS
    default_kind: ClassVar[str] = "decoder"
    kind: ClassVar[str]
    reads_distributions: ClassVar[bool] = False
    """Say whether the model's `forward` takes `soft_BTV`, as the decoder's does."""
    gives_hidden: ClassVar[bool] = False
    """Say whether the model's `forward` takes `hidden`, as the decoder's does."""

    @abstractmethod
    def build(self, context: ModelContext) -> "LanguageModel":
        """Return the model, initialised from torch's generator; raise UserError if the context cannot serve it."""

    @abstractmethod
    def num_params(self, context: ModelContext) -> int: ...

    @abstractmethod
    def flops_per_token(self, context: ModelContext, length: int) -> float: ...

    @abstractmethod
    def mixer_flops_per_token(self, context: ModelContext, length: int) -> float:
        """Return the part of `flops_per_token` that its mixers answer for."""

    @abstractmethod
    def state_bytes(self, context: ModelContext, length: int, dtype: torch.dtype) -> int: ...

    @property
    def document_multiple(self) -> int:
        """Packed documents must begin at multiples of this many tokens."""
        return 1

    def equals_at(self, other: "ModelConfig", length: int) -> bool:
        """Say whether this model computes the same as `other` on every sequence of up to `length` tokens."""
        return self == other

    @classmethod
    def examples(cls) -> Sequence["ModelConfig"]:
        """Return the configs that the contract tests run."""
        return [cls()]


@dataclass(frozen=True)
class Decoding:
    """How a model was trained to be read: the logits at place t are those of token t + 1 + shift, so that shift + 1
    tokens come from each pass. With `answer_tokens`, one pass gives a whole answer of so many tokens without an end.
    `chain_removed` counts the tokens that the chains of thought lacked at the end of training, where the numbers that
    `backwards` names lost their last digits first; with `keep_brackets` those of a chain stay around nothing.
    """

    shift: int = 0
    answer_tokens: int | None = None
    chain_removed: int = 0
    backwards: Backwards | None = None
    keep_brackets: bool = False

    def check(self, task: Task) -> None:
        """Raise UserError unless the problems of `task` can be answered so many tokens a pass."""
        if not self.shift:
            return
        largest, reason = task.largest_shift()
        if self.shift > largest:
            allowed = f"1 to {largest}" if largest else "none, with this task"
            raise UserError(f"{self.shift} is not feasible: {reason}; allowed: {allowed}")
        if self.answer_tokens not in (None, task.answer_tokens):
            raise UserError(
                f"{self.shift} gives whole answers of {self.answer_tokens} tokens, these have {task.answer_tokens}"
            )

    def view(self, batch: Batch, pad_id: int, more_removed: np.ndarray | int = 0) -> Batch:
        """Return `batch` with the chains that are written, and with the targets that the logits are of.

        `more_removed`, one for all or one for each row (B,), is taken from the chains beside `chain_removed`.
        """
        written = without_chain(batch, self.chain_removed + more_removed, pad_id, self.backwards, self.keep_brackets)
        return written.shifted(self.shift, self.answer_tokens is not None)


def last_places(tokens_BT: Tensor, lengths_B: Tensor | None, count: int) -> Tensor:
    """Return (B, R), where the last `count` tokens of each row lie in the flattened B*T."""
    rows, tokens = tokens_BT.shape
    device = tokens_BT.device
    if lengths_B is None and count == 1:  # one kernel of a GPU, not six
        return torch.arange(1, rows + 1, device=device)[:, None] * tokens - 1
    first_B1 = torch.arange(rows, device=device)[:, None] * tokens
    ends_B1 = tokens if lengths_B is None else lengths_B[:, None]
    return first_B1 + (ends_B1 - count + torch.arange(count, device=device)).clamp(min=0)


def of_kind(model: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the plain data of a model made one of `kind`: whole if it is one, else with what the two share."""
    if kind == model.get("kind", ModelConfig.default_kind):
        return {**model, "kind": kind}
    known = {item.name for item in fields(MODELS.get(kind))} if kind in MODELS.names() else set()
    return {"kind": kind, **{key: model[key] for key in _SHARED if key in known and key in model}}


def chooses_rounded(state: State | None, device: torch.device) -> bool:
    """Say whether a token is chosen among logits that autocast would round: a state streams, without gradients."""
    return state is not None and not torch.is_grad_enabled() and autocast_dtype(device) is not None


def float_logits(y: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the logits of `y` (..., D) in float32, under autocast too: of symbols whose logits are rounded to bfloat16
    the best two are often equal."""
    with torch.autocast(y.device.type, enabled=False):
        return functional.linear(y.float(), weight_VD.float())


class LanguageModel(nn.Module, ABC):
    """Token ids to logits. `config` and `context` rebuild it, and `decoding` says which tokens its logits are of."""

    config: Any
    context: ModelContext
    decoding: Decoding = Decoding()

    @abstractmethod
    def init_state(
        self,
        batch: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Return the empty state of `batch` rows; room, device and dtype default to the model's own."""

    @abstractmethod
    def forward(
        self,
        tokens_BT: Tensor,
        state: Any = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        wanted_N: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Return (logits_BTV, state); the rules for `state`, `lengths_B` and `documents_BT` are the mixers'.

        `wanted_N`, int64 places in the flattened B*T, asks for those logits alone: logits_NV comes back, equal to
        these rows of all. Training scores answers, and what it does not score it need not compute.
        """

    def last(self, tokens_BT: Tensor, state: Any, lengths_B: Tensor | None, count: int = 1) -> tuple[Tensor, Any]:
        """Return (logits_BRV, state), the logits at the last R = `count` new tokens of each row alone.

        Of a row with fewer tokens they are any. Models override it that need not compute what the others read.
        """
        logits_BTV, state = self(tokens_BT, state, lengths_B=lengths_B)
        places_BR = last_places(tokens_BT, lengths_B, count)
        return logits_BTV.flatten(0, 1)[places_BR], state

    def step(self, tokens_B1: Tensor, state: Any, lengths_B: Tensor | None) -> tuple[Tensor, Any]:
        """Return (logits_B1V, state) after one token a row, leaving what `settle` does to it.

        Rows at different places do the same work. Under no_grad the state keeps its tensors, so that the step can be
        captured. `lengths_B` is 1, or 0 in rows that are finished and stay as they are.
        """
        return self(tokens_B1, state, lengths_B=lengths_B)

    def settling(self, lengths: Iterable[int]) -> int | None:
        """Return how much work `settle` finds after a step that brought rows to these lengths; None: nothing."""
        return None

    def settle(self, state: Any, lengths_B: Tensor | None, work: int) -> None:
        """Do, in place, what rows need that the last step brought to a boundary; the others stay as they are.

        `lengths_B` is that of the step, `work` at least what `settling` said of the rows that are not finished.
        """
