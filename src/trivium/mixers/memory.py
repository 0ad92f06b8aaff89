"""What mixers with a running memory share: its state, and the short convolution before it.

Shapes: B rows, T tokens, C channels, H heads, K key width, V value width, R = window - 1 remembered inputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.mixers.base import State
from trivium.mixers.heads import check_count
from trivium.ops.memory_step import convolution_step_
from trivium.ops.recurrence import restarts
from trivium.registry import UserError


@dataclass
class MemoryState(State):
    """The memory of each head, and the last inputs of the short convolution (None without one)."""

    memory_BHKV: Tensor
    recent_BRC: Tensor | None

    def after(self, memory_BHKV: Tensor, recent_BRC: Tensor | None) -> "MemoryState":
        """Return the state after new tokens; in place under no_grad."""
        if torch.is_grad_enabled():
            return MemoryState(memory_BHKV, recent_BRC)
        self.memory_BHKV.copy_(memory_BHKV)
        if self.recent_BRC is not None and recent_BRC is not None:
            self.recent_BRC.copy_(recent_BRC)
        return self


def empty_memory(
    batch: int,
    heads: int,
    widths: tuple[int, int],
    window: int | None,
    channels: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> MemoryState:
    """Return the empty state; the memory is a running sum and stays in float32 or wider."""
    memory = torch.zeros(batch, heads, *widths, device=device, dtype=memory_dtype(dtype))
    recent = None if window is None else torch.zeros(batch, window - 1, channels, device=device, dtype=dtype)
    return MemoryState(memory, recent)


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a memory whose model computes in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_bytes(heads: int, widths: tuple[int, int], window: int | None, channels: int, dtype: torch.dtype) -> int:
    """Return the bytes of one row of `empty_memory`."""
    recent = 0 if window is None else (window - 1) * channels * dtype.itemsize
    return heads * widths[0] * widths[1] * memory_dtype(dtype).itemsize + recent


def check_convolution(window: int | None) -> None:
    """Raise UserError unless the convolution's window is None or at least 2."""
    check_count("convolution", window)
    if window == 1:
        raise UserError("convolution: 1 is not allowed; give at least 2, or null for none")


def steps_in_place(state: State | None, tokens: int, backend: str) -> bool:
    """Say whether a token can change the state in place: one token, no gradient, and no other backend named."""
    return state is not None and tokens == 1 and not torch.is_grad_enabled() and backend in ("auto", "torch")


def refuse_documents_with_state(state: State | None, documents_BT: Tensor | None) -> None:
    """Raise ValueError when both are given."""
    if state is not None and documents_BT is not None:
        raise ValueError("documents_BT: a state continues one document a row; give documents or a state, not both")


def real_tokens(tokens: int, lengths_B: Tensor, ndim: int) -> Tensor:
    """Return (B, T, 1, ...) bool: which tokens are a row's own, not padding behind them."""
    real_BT = torch.arange(tokens, device=lengths_B.device) < lengths_B[:, None]
    return real_BT.view(*real_BT.shape, *[1] * (ndim - 2))


class ShortConvolution(nn.Module):
    """A causal convolution over the last few tokens, each channel by itself, and SiLU."""

    def __init__(self, channels: int, window: int):
        super().__init__()
        bound = 1 / math.sqrt(window)  # as torch's Conv1d begins
        self.weight_RC = nn.Parameter(torch.empty(window, channels).uniform_(-bound, bound))

    def forward(
        self,
        x_BTC: Tensor,
        recent_BRC: Tensor | None = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (y_BTC, the last window - 1 inputs); `recent_BRC` are those before x (default: zeros).

        One token under no_grad moves them in place.
        """
        (batch, tokens, channels), past = x_BTC.shape, self.weight_RC.shape[0] - 1
        alone = tokens == 1 and lengths_B is None and documents_BT is None
        if alone and recent_BRC is not None and recent_BRC.dtype == x_BTC.dtype and not torch.is_grad_enabled():
            weight_RC = self.weight_RC.to(x_BTC.dtype)
            return convolution_step_(x_BTC[:, 0], recent_BRC, weight_RC)[:, None], recent_BRC
        before_BRC = x_BTC.new_zeros(batch, past, channels) if recent_BRC is None else recent_BRC.to(x_BTC.dtype)
        seen_BSC = torch.cat((before_BRC, x_BTC), dim=1)
        run_BS = None
        if documents_BT is not None:
            run_BT = restarts(documents_BT).cumsum(1)
            run_BS = functional.pad(run_BT, (past, 0), value=-1)
        weight_RC = self.weight_RC.to(x_BTC.dtype)
        if alone:
            return functional.silu((seen_BSC * weight_RC).sum(1, keepdim=True)), seen_BSC[:, 1:]
        y_BTC = x_BTC * weight_RC[past]
        for place in range(past):
            input_BTC = seen_BSC[:, place : place + tokens]
            if run_BS is not None:
                other_BT = run_BS[:, place : place + tokens] != run_BS[:, past:]
                input_BTC = input_BTC.masked_fill(other_BT[..., None], 0)
            y_BTC = y_BTC + input_BTC * weight_RC[place]
        if lengths_B is None:
            return functional.silu(y_BTC), seen_BSC[:, tokens:]
        last_BR = lengths_B[:, None] + torch.arange(past, device=x_BTC.device)
        recent_BRC = seen_BSC.gather(1, last_BR[..., None].expand(-1, -1, channels))
        return functional.silu(y_BTC), recent_BRC
