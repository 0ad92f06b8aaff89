"""The language model contract: token ids to logits, with the same streaming state as the mixers.

Shapes: B rows, T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trivium.mixers.base import State
from trivium.registry import Registry

MODELS = Registry("model", "trivium.model")


@dataclass(frozen=True)
class ModelContext:
    """What a task tells the model: vocabulary size, the longest sequence in tokens, which ids are digits, and whether
    every number is written least significant digit first."""

    vocab_size: int
    max_length: int
    digit_ids: tuple[int, ...] = ()
    least_first: bool = False
    backends: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig(ABC):
    """Base of every model's config. `num_params` counts each tied tensor once; FLOPs as in MixerConfig."""

    registry: ClassVar[Registry] = MODELS
    default_kind: ClassVar[str] = "decoder"
    kind: ClassVar[str]

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


class LanguageModel(nn.Module, ABC):
    """Token ids to logits. `config` and `context` rebuild it."""

    config: Any
    context: ModelContext

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
