"""Gated DeltaNet and DeltaProduct as a mixer (arXiv 2412.06464, 2502.10297): a memory that is corrected.

Shapes: B rows, T tokens, D width, H heads, K head width, N delta steps a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.mixers import cache, memory
from trivium.mixers.base import MIXERS, Mixer, MixerConfig, MixerContext
from trivium.mixers.heads import HeadNorm, check_count, num_kv_heads
from trivium.mixers.memory import MemoryState, ShortConvolution
from trivium.ops import gated_delta_rule
from trivium.ops.delta_rule.step import gated_delta_rule_step_


@MIXERS.register("gated_deltanet")
@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Gated DeltaNet (arXiv 2412.06464): each token replaces what the memory holds under its key."""

    householder: int = 1
    """Delta steps a token, each with a key, value and strength of its own; above 1 it is DeltaProduct."""
    negative_eigenvalues: bool = False
    """Let a step's strength reach 2 instead of 1, so that it can turn a direction over: needed to count and permute."""
    decay: bool = True
    """Let the memory fade by a factor a token and head; false never forgets, as DeltaNet."""
    output_gate: bool = True
    """Multiply the normalised output by SiLU of a map of the token."""
    convolution: int | None = 4
    """Tokens that a short convolution before queries, keys and values reads, itself included; null for none."""

    def __post_init__(self):
        check_count("householder", self.householder)
        memory.check_convolution(self.convolution)

    def build(self, context: MixerContext) -> "GatedDeltaNet":
        return GatedDeltaNet(self, context)

    def num_params(self, context: MixerContext) -> int:
        heads, channels = num_kv_heads(context, None), self.channels(context.width)
        gates = context.width * self._gates(context)
        outer = (2 if self.output_gate else 1) * context.width**2
        decay = 2 * heads if self.decay else 0
        return (
            context.width * channels + gates + outer + decay + channels * (self.convolution or 0) + context.head_width
        )

    def flops_per_token(self, context: MixerContext, length: int) -> float:
        """Count the projections, the convolution, and (3 + 4 n) K^2 a head.

        That is the decay (1), n times the memory's answer to a key (2) and its correction (2), and the reading (2).
        """
        channels, width = self.channels(context.width), context.width
        projections = channels + self._gates(context) + (2 if self.output_gate else 1) * width
        steps = (1.0 if self.decay else 0.0) + 4 * self.householder + 2
        convolution = 2 * channels * (self.convolution or 0)
        return 2 * width * projections + convolution + steps * context.heads * context.head_width**2

    def state_bytes(self, context: MixerContext, length: int, dtype: torch.dtype) -> int:
        widths = (context.head_width, context.head_width)
        return memory.memory_bytes(context.heads, widths, self.convolution, self.channels(context.width), dtype)

    def channels(self, width: int) -> int:
        """Return the width of queries, keys and values together."""
        return (1 + 2 * self.householder) * width

    def _gates(self, context: MixerContext) -> int:
        return (self.householder + (1 if self.decay else 0)) * context.heads

    @classmethod
    def examples(cls) -> Sequence["GatedDeltaNetConfig"]:
        return [
            cls(),
            cls(negative_eigenvalues=True, output_gate=False, convolution=None),
            cls(householder=3, negative_eigenvalues=True, convolution=2),
            cls(householder=2, decay=False),
        ]


class GatedDeltaNet(Mixer):
    """See GatedDeltaNetConfig. `qkv` holds the rows of q, then N times k, then N times v, each head by head.

    A step's strength is beta = sigmoid(W x), or twice that; the log decay is -exp(a) softplus(W x + b) in each head,
    with a and b begun as Mamba-2 does (arXiv 2405.21060), so that half-lives spread from a token to hundreds.
    Queries and keys have length 1. Positions play no part.
    """

    def __init__(self, config: GatedDeltaNetConfig, context: MixerContext):
        super().__init__()
        self.heads, self.head_width = num_kv_heads(context, None), context.head_width
        self.steps, self.window = config.householder, config.convolution
        self.strongest = 2 if config.negative_eigenvalues else 1
        self.backend = context.backend("gated_delta_rule")
        width, self.channels = context.width, config.channels(context.width)
        self.qkv = nn.Linear(width, self.channels, bias=False)
        self.strength = nn.Linear(width, self.steps * self.heads, bias=False)
        self.decay, self.decay_rate_H, self.decay_bias_H = None, None, None
        if config.decay:
            self.decay = nn.Linear(width, self.heads, bias=False)
            self.decay_rate_H = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
            step_H = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.decay_bias_H = nn.Parameter(step_H + (-torch.expm1(-step_H)).log())  # softplus of it is step_H
        self.convolution = None if self.window is None else ShortConvolution(self.channels, self.window)
        self.gate = nn.Linear(width, width, bias=False) if config.output_gate else None
        self.norm = HeadNorm(self.head_width)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype) -> MemoryState:
        widths = (self.head_width, self.head_width)
        return memory.empty_memory(batch, self.heads, widths, self.window, self.channels, device, dtype)

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
        if self.convolution is None:
            qkv = functional.silu(qkv)
        else:
            recent = None if state is None else state.recent_BRC
            qkv, recent = self.convolution(qkv, recent, lengths_B=lengths_B, documents_BT=documents_BT)
        heads_BTnHK = qkv.unflatten(-1, (-1, self.heads, self.head_width))
        qk_BTnHK, v_BTNHK = heads_BTnHK.split((1 + self.steps, self.steps), dim=2)
        # Autocast makes norms in float32, and the operator wants its inputs alike.
        qk_BTnHK = functional.normalize(qk_BTnHK, dim=-1, eps=1e-6).to(v_BTNHK.dtype)
        q_BT1HK, k_BTNHK = qk_BTnHK.split((1, self.steps), dim=2)
        strength = self.strength(x_BTD)
        beta_BTNH = self.strongest * strength.to(memory.memory_dtype(strength.dtype)).sigmoid()
        beta_BTNH = beta_BTNH.unflatten(-1, (self.steps, self.heads))
        log_decay_BTH = self._log_decay(x_BTD, beta_BTNH)
        if lengths_B is not None:  # padding writes nothing and forgets nothing
            real_BT1 = memory.real_tokens(x_BTD.shape[1], lengths_B, 3)
            beta_BTNH, log_decay_BTH = beta_BTNH * real_BT1[..., None], log_decay_BTH * real_BT1
        y_BTHK, after = self._steps(q_BT1HK, k_BTNHK, v_BTNHK, beta_BTNH, log_decay_BTH, state, documents_BT)
        y_BTD = self.norm(y_BTHK).flatten(2)
        if self.gate is not None:
            y_BTD = y_BTD * functional.silu(self.gate(x_BTD))
        return self.out(y_BTD), None if state is None else state.after(after, recent)

    def _log_decay(self, x_BTD: Tensor, beta_BTNH: Tensor) -> Tensor:
        if self.decay is None or self.decay_rate_H is None or self.decay_bias_H is None:
            return torch.zeros_like(beta_BTNH[:, :, 0])
        wide = beta_BTNH.dtype
        input_BTH = self.decay(x_BTD).to(wide) + self.decay_bias_H.to(wide)
        return -self.decay_rate_H.to(wide).exp() * functional.softplus(input_BTH)

    def _steps(
        self,
        q_BT1HK: Tensor,
        k_BTNHK: Tensor,
        v_BTNHK: Tensor,
        beta_BTNH: Tensor,
        log_decay_BTH: Tensor,
        state: MemoryState | None,
        documents_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Lay each token's N steps out in time: the first one decays, the last one is read."""
        if state is not None and memory.steps_in_place(state, q_BT1HK.shape[1], self.backend):
            y_BHK = gated_delta_rule_step_(
                q_BT1HK[:, 0, 0],
                k_BTNHK[:, 0],
                v_BTNHK[:, 0],
                beta_BTNH[:, 0],
                None if self.decay is None else log_decay_BTH[:, 0],
                state.memory_BHKV,
                scale=self.head_width**-0.5,
            )
            return y_BHK[:, None], state.memory_BHKV
        more = self.steps - 1
        log_decay_BTNH = functional.pad(log_decay_BTH[:, :, None], (0, 0, 0, more))
        q_BTNHK = functional.pad(q_BT1HK, (0, 0, 0, 0, more, 0))
        steps = (x.flatten(1, 2) for x in (q_BTNHK, k_BTNHK, v_BTNHK, beta_BTNH, log_decay_BTNH))
        y_BSHK, after = gated_delta_rule(
            *steps,
            state=None if state is None else state.memory_BHKV,
            documents=None if documents_BT is None else documents_BT.repeat_interleave(self.steps, dim=1),
            backend=self.backend,
        )
        return y_BSHK[:, more :: self.steps], after
