"""The mixer contract: one call for training on whole sequences and for streaming them in pieces.

Shapes: B rows, T new tokens, D width of the residual stream. Rows are left-aligned: row b holds
``lengths_B[b]`` new tokens, what lies behind them never touches its state, and 0 leaves the row as it is.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trivium.ops.repeat_rows import repeat_rows
from trivium.registry import Registry

MIXERS = Registry("mixer", "trivium.mixers")


@dataclass(frozen=True)
class MixerContext:
    """What a block tells the mixer it builds: sizes, positions and which backend each operator should use."""

    width: int
    heads: int
    max_length: int
    positions: str = "none"
    rotary_base: float = 10_000.0
    backends: Mapping[str, str] = field(default_factory=dict)

    def backend(self, operator: str) -> str:
        """Return the backend asked for `operator`; "auto" when the recipe names none."""
        return self.backends.get(operator, "auto")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass
class State:
    """What a mixer or model remembers of each row. Subclasses are dataclasses of tensors with B first, or of States.

    The empty state is all zeros, so that resetting a row is zeroing it.
    """

    def _map(self, function: Any) -> Self:
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, State):
                return value._map(function)
            if isinstance(value, list | tuple):
                return type(value)(apply(item) for item in value)
            return value

        values = {item.name: apply(getattr(self, item.name)) for item in dataclasses.fields(self)}
        return dataclasses.replace(self, **values)

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the state, those of nested states included."""
        found: list[Tensor] = []
        self._map(lambda tensor: found.append(tensor) or tensor)
        return found

    def counters(self) -> list[Tensor]:
        """Return the tensors, those of nested states too, that empty the state once they are zero, for a model that is
        told so (`cache.known_empty`): all, except in states whose mixer never reads what is left elsewhere.
        """
        found: list[Tensor] = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Tensor):
                    found.append(each)
                elif isinstance(each, State):
                    found += each.counters()
        return found

    def num_bytes(self) -> int:
        """Return the bytes that the state holds for all rows together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def select(self, rows: Tensor) -> Self:
        """Return the state of `rows` (int64 ids, any order, repeats allowed), copied."""
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def reset(self, rows: Tensor) -> Self:
        """Return the state with `rows` emptied; in place under no_grad, a copy under grad."""

        def clear(tensor: Tensor) -> Tensor:
            return tensor.index_fill(0, rows, 0) if torch.is_grad_enabled() else tensor.index_fill_(0, rows, 0)

        return self._map(clear)


@dataclass(frozen=True)
class MixerConfig(ABC):
    """Base of every mixer's config: it builds the module and knows what that costs.

    `length` is a sequence length in tokens. FLOPs are those of the forward pass, 2 for a multiply-add, counting
    exactly the allowed pairs, averaged over the tokens of a sequence of that length. Bytes are for one row.
    """

    registry: ClassVar[Registry] = MIXERS
    kind: ClassVar[str]

    @abstractmethod
    def build(self, context: MixerContext) -> "Mixer": ...

    @abstractmethod
    def num_params(self, context: MixerContext) -> int: ...

    @abstractmethod
    def flops_per_token(self, context: MixerContext, length: int) -> float: ...

    @abstractmethod
    def state_bytes(self, context: MixerContext, length: int, dtype: torch.dtype) -> int: ...

    def equals_at(self, other: "MixerConfig", length: int) -> bool:
        """Say whether this mixer computes the same as `other` on every sequence of up to `length` tokens.

        `compare` refuses a control that equals another variant, such as a window that covers the whole sequence.
        """
        return self == other

    @classmethod
    def examples(cls) -> Sequence["MixerConfig"]:
        """Return the configs that the contract tests run; override to cover options and odd sizes."""
        return [cls()]


class Mixer(nn.Module, ABC):
    """A way in which tokens exchange information.

    `out` is its last map, into the residual stream: the model scales down the weights that it starts with, so that
    depth doesn't change the stream's size.
    """

    out: nn.Linear

    @abstractmethod
    def init_state(self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype) -> Any:
        """Return the empty state of `batch` rows with room for `max_length` tokens."""

    @abstractmethod
    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Mix tokens; return (y_BTD, state).

        Without `state`: the parallel form over whole sequences, and None comes back. `documents_BT` (integer ids)
        keeps packed documents apart. With `state`: continue from it, for any T >= 1. Under grad a new state comes
        back and gradients flow through it; under no_grad the given state's tensors are updated in place.
        `positions_BT` are the places of the tokens in their document (default: counted by the mixer).
        Raises ValueError when the tokens do not fit the state's room.
        """

    def at(
        self,
        x_BTD: Tensor,
        wanted_N: Tensor,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Return y_ND, the parallel form at `wanted_N` (int64 places in the flattened B*T) alone.

        Mixers that can spare the other tokens their work override this; the result is the same.
        """
        y_BTD, _ = self(x_BTD, None, lengths_B=lengths_B, documents_BT=documents_BT, positions_BT=positions_BT)
        return y_BTD.flatten(0, 1).index_select(0, wanted_N)

    def of_rows(self, rows_UD: Tensor, index_BT: Tensor, *, positions_BT: Tensor | None = None) -> Tensor:
        """Return y_BTD, the parallel form of x_BTD = rows_UD[index_BT], of which many tokens are alike.

        Mixers that begin with a map of each token override this and apply it to the U rows; the result is the same.
        """
        return self(repeat_rows(rows_UD, index_BT), None, positions_BT=positions_BT)[0]

    def add_to(
        self,
        x_BTD: Tensor,
        norm: nn.Module,
        state: Any = None,
        *,
        wanted_N: Tensor | None = None,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Return (x + mixer(norm(x)), state) without gradients; what lies behind a row's tokens is finite.

        With `wanted_N`, places in the flattened B*T, (N, D) comes back; the rest is as in the call. Mixers that can do
        this in fewer kernels override it; the result is the same.
        """
        y_BTD, state = self(
            norm(x_BTD), state, lengths_B=lengths_B, documents_BT=documents_BT, positions_BT=positions_BT
        )
        if wanted_N is not None:
            x_BTD, y_BTD = (each.flatten(0, 1).index_select(0, wanted_N) for each in (x_BTD, y_BTD))
        return x_BTD + y_BTD, state
