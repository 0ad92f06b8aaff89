"""Gated linear attention as a mixer (arXiv 2312.06635): a memory of fixed size with a decay for each key channel.

Shapes: B rows, T tokens, D width, H heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.mixers import cache, memory
from trivium.mixers.base import MIXERS, Mixer, MixerConfig, MixerContext
from trivium.mixers.heads import HeadNorm, check_count, num_kv_heads
from trivium.mixers.memory import MemoryState, ShortConvolution
from trivium.ops import gated_linear_attention
from trivium.ops.linear_attention.step import gated_linear_attention_step_


@MIXERS.register("gla")
@dataclass(frozen=True)
class GLAConfig(MixerConfig):
    """Gated linear attention (arXiv 2312.06635): keys and values are added to a memory that forgets by the channel."""

    gate_rank: int = 16
    """Width between the two maps that make the decays out of a token."""
    output_gate: bool = True
    """Multiply the normalised output by SiLU of a map of the token."""
    convolution: int | None = None
    """Tokens that a short convolution before queries, keys and values reads, itself included; null for none."""

    def __post_init__(self):
        check_count("gate_rank", self.gate_rank)
        memory.check_convolution(self.convolution)

    def build(self, context: MixerContext) -> "GLA":
        return GLA(self, context)

    def num_params(self, context: MixerContext) -> int:
        width, heads = context.width, num_kv_heads(context, None)
        decay = self.gate_rank * 2 * width + width
        convolution = 3 * width * (self.convolution or 0)
        return (5 if self.output_gate else 4) * width**2 + decay + convolution + width // heads

    def flops_per_token(self, context: MixerContext, length: int) -> float:
        """Count the projections, the convolution, and 5 K^2 a head: decay (1), add the outer product (2), read (2)."""
        width = context.width
        projections = 2 * (5 if self.output_gate else 4) * width**2 + 4 * self.gate_rank * width
        convolution = 2 * 3 * width * (self.convolution or 0)
        return projections + convolution + 5.0 * context.heads * context.head_width**2

    def state_bytes(self, context: MixerContext, length: int, dtype: torch.dtype) -> int:
        widths = (context.head_width, context.head_width)
        return memory.memory_bytes(context.heads, widths, self.convolution, 3 * context.width, dtype)

    @classmethod
    def examples(cls) -> Sequence["GLAConfig"]:
        return [cls(), cls(gate_rank=3, output_gate=False, convolution=4)]


class GLA(Mixer):
    """See GLAConfig. `qkv` holds the rows of q, then k, then v, each head by head.

    The decays are g = logsigmoid(W2 W1 x + b) / 16, which begins near 0.96 a token. Positions play no part.
    """

    def __init__(self, config: GLAConfig, context: MixerContext):
        super().__init__()
        self.heads, self.head_width = num_kv_heads(context, None), context.head_width
        self.width, self.window = context.width, config.convolution
        self.backend = context.backend("gated_linear_attention")
        self.qkv = nn.Linear(self.width, 3 * self.width, bias=False)
        self.decay = nn.Sequential(
            nn.Linear(self.width, config.gate_rank, bias=False), nn.Linear(config.gate_rank, self.width)
        )
        self.convolution = None if self.window is None else ShortConvolution(3 * self.width, self.window)
        self.gate = nn.Linear(self.width, self.width, bias=False) if config.output_gate else None
        self.norm = HeadNorm(self.head_width)
        self.out = nn.Linear(self.width, self.width, bias=False)

    def init_state(self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype) -> MemoryState:
        widths = (self.head_width, self.head_width)
        return memory.empty_memory(batch, self.heads, widths, self.window, 3 * self.width, device, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        state: MemoryState | None = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState | None]:
        memory.refuse_documents_with_state(state, documents_BT)
        x_BTD = cache.without_padding(x_BTD, lengths_B)
        qkv, recent = self.qkv(x_BTD), None
        if self.convolution is not None:
            recent = None if state is None else state.recent_BRC
            qkv, recent = self.convolution(qkv, recent, lengths_B=lengths_B, documents_BT=documents_BT)
        q_BTHK, k_BTHK, v_BTHK = qkv.unflatten(-1, (3, self.heads, self.head_width)).unbind(2)
        gates_BTD = self.decay(x_BTD)
        log_decay_BTD = functional.logsigmoid(gates_BTD.to(memory.memory_dtype(gates_BTD.dtype))) / 16
        log_decay_BTHK = log_decay_BTD.unflatten(-1, (self.heads, self.head_width))
        if lengths_B is not None:  # padding writes nothing and forgets nothing
            real_BT11 = memory.real_tokens(x_BTD.shape[1], lengths_B, 4)
            k_BTHK, log_decay_BTHK = k_BTHK * real_BT11, log_decay_BTHK * real_BT11
        if state is not None and memory.steps_in_place(state, x_BTD.shape[1], self.backend):
            after, scale = state.memory_BHKV, self.head_width**-0.5
            token = (q_BTHK[:, 0], k_BTHK[:, 0], v_BTHK[:, 0], log_decay_BTHK[:, 0])
            y_BTHK = gated_linear_attention_step_(*token, after, scale=scale)[:, None]
        else:
            y_BTHK, after = gated_linear_attention(
                q_BTHK,
                k_BTHK,
                v_BTHK,
                log_decay_BTHK,
                state=None if state is None else state.memory_BHKV,
                documents=documents_BT,
                backend=self.backend,
            )
        y_BTD = self.norm(y_BTHK).flatten(2)
        if self.gate is not None:
            y_BTD = y_BTD * functional.silu(self.gate(x_BTD))
        return self.out(y_BTD), None if state is None else state.after(after, recent)
