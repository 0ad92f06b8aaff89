"""A gated recurrent unit as a mixer (arXiv 1406.1078): the recurrent control, sequential in training too.

Shapes: B rows, T tokens, D width, N documents of all rows, L the longest document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trivium.mixers import cache
from trivium.mixers.base import MIXERS, Mixer, MixerConfig, MixerContext, State
from trivium.mixers.memory import refuse_documents_with_state
from trivium.ops.recurrence import document_bounds


@MIXERS.register("gru")
@dataclass(frozen=True)
class GRUConfig(MixerConfig):
    """Gated recurrent unit (arXiv 1406.1078) of the stream's width: a non-linear recurrence, one token at a time."""

    bias: bool = True
    """Add biases inside the unit."""

    def build(self, context: MixerContext) -> "GRU":
        return GRU(self, context)

    def num_params(self, context: MixerContext) -> int:
        return 7 * context.width**2 + (6 * context.width if self.bias else 0)

    def flops_per_token(self, context: MixerContext, length: int) -> float:
        """Count the three maps of the token, the three of the hidden state, and the one of the output."""
        return 2.0 * 7 * context.width**2

    def state_bytes(self, context: MixerContext, length: int, dtype: torch.dtype) -> int:
        return context.width * dtype.itemsize

    @classmethod
    def examples(cls) -> Sequence["GRUConfig"]:
        return [cls(), cls(bias=False)]


@dataclass
class GRUState(State):
    """The hidden state of each row."""

    hidden_BD: Tensor


class GRU(Mixer):
    """See GRUConfig. It runs in its weights' precision, under autocast too: a recurrence adds up its roundings."""

    def __init__(self, config: GRUConfig, context: MixerContext):
        super().__init__()
        self.width = context.width
        self.unit = nn.GRU(self.width, self.width, bias=config.bias, batch_first=True)
        self.out = nn.Linear(self.width, self.width, bias=False)

    def init_state(self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype) -> GRUState:
        return GRUState(torch.zeros(batch, self.width, device=device, dtype=dtype))

    def forward(
        self,
        x_BTD: Tensor,
        state: GRUState | None = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, GRUState | None]:
        refuse_documents_with_state(state, documents_BT)
        x_BTD = cache.without_padding(x_BTD, lengths_B)
        past_BD = None if state is None else state.hidden_BD
        y_BTD = self._run(x_BTD, past_BD) if documents_BT is None else self._run_documents(x_BTD, documents_BT)
        mixed_BTD = self.out(y_BTD)
        if state is None:
            return mixed_BTD, None
        hidden_BD = y_BTD[:, -1]
        if lengths_B is not None:
            rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
            reached_BD = y_BTD[rows_B, (lengths_B - 1).clamp(min=0)]
            hidden_BD = torch.where(lengths_B[:, None] > 0, reached_BD, state.hidden_BD)
        if torch.is_grad_enabled():
            return mixed_BTD, GRUState(hidden_BD)
        state.hidden_BD.copy_(hidden_BD)
        return mixed_BTD, state

    def _run(self, x_BTD: Tensor, hidden_BD: Tensor | None) -> Tensor:
        precise = next(self.unit.parameters()).dtype
        start_1BD = None if hidden_BD is None else hidden_BD.to(precise)[None].contiguous()
        with torch.autocast(x_BTD.device.type, enabled=False):
            if start_1BD is not None and x_BTD.shape[1] == 1 and not torch.is_grad_enabled():
                # A sequence of one: the library's recurrence costs more than its arithmetic.
                weights: Any = self.unit.all_weights[0]
                return torch.gru_cell(x_BTD[:, 0].to(precise), start_1BD[0], *weights)[:, None]
            return self.unit(x_BTD.to(precise), start_1BD)[0]

    def _run_documents(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        """Give each document a row of its own, so that it begins from an empty hidden state."""
        bounds, _, _ = document_bounds(documents_BT)
        tokens = documents_BT.numel()
        place = torch.arange(tokens, device=x_BTD.device)
        document = torch.searchsorted(bounds, place, right=True) - 1
        offset = place - bounds[document]
        shape = (len(bounds) - 1, int((bounds[1:] - bounds[:-1]).max()), self.width)
        rows_NLD = x_BTD.new_zeros(shape).index_put((document, offset), x_BTD.flatten(0, 1))
        return self._run(rows_NLD, None)[document, offset].unflatten(0, documents_BT.shape)
