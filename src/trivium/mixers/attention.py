"""Softmax attention: multi-head or grouped queries, over everything before a token or a local window.

Shapes: B rows, T tokens, D width, H query heads, G key/value heads, K head width, C slots, S keys.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivium.mixers import cache
from trivium.mixers.base import MIXERS, Mixer, MixerConfig, MixerContext, State
from trivium.mixers.heads import HeadNorm, check_count, num_kv_heads
from trivium.mixers.rotary import count_positions, rotate
from trivium.ops.attention import attention
from trivium.ops.cached_attention.step import cached_step
from trivium.ops.fused_linear import linear_add, norm_linear
from trivium.ops.linear import Linear, linear
from trivium.ops.norm_attention import Parts, norm_attention
from trivium.ops.packed_attention import packed_attention
from trivium.ops.pairs import allowed_pairs
from trivium.ops.repeat_rows import repeat_rows
from trivium.registry import UserError


@MIXERS.register("attention")
@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Softmax attention (arXiv 1706.03762); with a window it is local attention."""

    window: int | None = None
    """How many tokens a query reads, itself included; null reads all before it."""
    kv_heads: int | None = None
    """Key/value heads that the query heads share in equal groups; null gives each its own."""
    qk_norm: bool = False
    """Normalise queries and keys (RMS over the head width) before their product."""
    bias: bool = False
    """Add a bias to the projections, as GPT-2 does."""

    def __post_init__(self):
        check_count("window", self.window)
        check_count("kv_heads", self.kv_heads)

    def build(self, context: MixerContext) -> "Attention":
        return Attention(self, context)

    def num_params(self, context: MixerContext) -> int:
        inner, outer = _widths(self, context)
        weights = context.width * (inner + outer)
        biases = inner + context.width if self.bias else 0
        return weights + biases + (2 * context.head_width if self.qk_norm else 0)

    def flops_per_token(self, context: MixerContext, length: int) -> float:
        inner, outer = _widths(self, context)
        pairs = context.heads * allowed_pairs(length, self.window) / max(length, 1)
        return 2 * context.width * (inner + outer) + 4 * context.head_width * pairs

    def state_bytes(self, context: MixerContext, length: int, dtype: torch.dtype) -> int:
        slots = cache.capacity(self.window, length)
        kv_width = num_kv_heads(context, self.kv_heads) * context.head_width
        return 2 * slots * kv_width * dtype.itemsize + torch.int64.itemsize

    def equals_at(self, other: MixerConfig, length: int) -> bool:
        return isinstance(other, AttentionConfig) and _clamped(self, length) == _clamped(other, length)

    @classmethod
    def examples(cls) -> Sequence["AttentionConfig"]:
        return [cls(), cls(window=3), cls(window=5, kv_heads=2, qk_norm=True, bias=True), cls(window=1, kv_heads=1)]


def _clamped(config: AttentionConfig, length: int) -> AttentionConfig:
    covers = config.window is not None and config.window >= length
    return dataclasses.replace(config, window=None) if covers else config


def _widths(config: AttentionConfig, context: MixerContext) -> tuple[int, int]:
    kv_heads = num_kv_heads(context, config.kv_heads)
    return (context.heads + 2 * kv_heads) * context.head_width, context.heads * context.head_width


@dataclass
class AttentionState(State):
    """Tokens seen, and the last C keys and values of each row."""

    length_B: Tensor
    keys_BCGK: Tensor
    values_BCGK: Tensor

    def counters(self) -> list[Tensor]:
        return [self.length_B]


class Attention(Mixer):
    """See AttentionConfig. `qkv` holds the rows of q, then k, then v, each head by head."""

    def __init__(self, config: AttentionConfig, context: MixerContext):
        super().__init__()
        self.heads, self.kv_heads = context.heads, num_kv_heads(context, config.kv_heads)
        self.head_width, self.window = context.head_width, config.window
        self.backend, self.cached_backend = context.backend("attention"), context.backend("cached_attention")
        self.packed_backend, self.step_backend = context.backend("packed_attention"), context.backend("cached_step")
        self.norm_backend, self.add_backend = context.backend("norm_linear"), context.backend("linear_add")
        self.whole_backend = context.backend("norm_attention")
        self.parts = Parts(*(context.backend(name) for name in Parts._fields))
        self.rotary_base = context.rotary_base if context.positions == "rotary" else None
        if self.rotary_base is not None and self.head_width % 2:
            raise UserError(f"positions: rotary needs an even head width, {context.width}/{context.heads} is odd")
        inner, outer = _widths(config, context)
        self.linear_backend = context.backend("linear")
        self.qkv = Linear(context.width, inner, bias=config.bias, backend=self.linear_backend)
        self.out = Linear(outer, context.width, bias=config.bias, backend=self.linear_backend)
        self.query_norm = HeadNorm(self.head_width) if config.qk_norm else nn.Identity()
        self.key_norm = HeadNorm(self.head_width) if config.qk_norm else nn.Identity()
        self.turns = config.qk_norm or self.rotary_base is not None  # queries and keys are not as projected

    def init_state(self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        dtype = cache.dtype_of(dtype, device)
        shape = (batch, cache.capacity(self.window, max_length), self.kv_heads, self.head_width)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return AttentionState(torch.zeros(batch, dtype=torch.int64, device=device), keys, values)

    def forward(
        self,
        x_BTD: Tensor,
        state: AttentionState | None = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        heads_BTND = self.qkv(cache.without_padding(x_BTD, lengths_B))
        y_BTHK, state = self._mix(heads_BTND, state, lengths_B, documents_BT, positions_BT)
        return self.out(y_BTHK.flatten(2)), state

    def add_to(
        self,
        x_BTD: Tensor,
        norm: nn.Module,
        state: AttentionState | None = None,
        *,
        wanted_N: Tensor | None = None,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        if not self._calls_alone() or self.linear_backend != "auto":
            return super().add_to(
                *(x_BTD, norm, state),
                wanted_N=wanted_N,
                lengths_B=lengths_B,
                documents_BT=documents_BT,
                positions_BT=positions_BT,
            )
        if state is not None and self._is_one(x_BTD, state, documents_BT):
            y_BTHK = norm_attention(
                *(x_BTD, norm, self.qkv.weight, self.qkv.bias),
                *(state.keys_BCGK, state.values_BCGK, state.length_B, lengths_B),
                window=self.window,
                empty=cache.is_known_empty(),
                backend=self.whole_backend,
                parts=self.parts,
            )
        else:
            heads_BTND = norm_linear(x_BTD, norm, self.qkv.weight, self.qkv.bias, backend=self.norm_backend)
            y_BTHK, state = self._mix(heads_BTND, state, lengths_B, documents_BT, positions_BT)
        y_BTD = y_BTHK.flatten(2)
        if wanted_N is not None:
            x_BTD, y_BTD = (each.flatten(0, 1).index_select(0, wanted_N) for each in (x_BTD, y_BTD))
        return linear_add(y_BTD, self.out.weight, self.out.bias, x_BTD, backend=self.add_backend), state

    def of_rows(self, rows_UD: Tensor, index_BT: Tensor, *, positions_BT: Tensor | None = None) -> Tensor:
        if not self._calls_alone():
            return super().of_rows(rows_UD, index_BT, positions_BT=positions_BT)
        y_BTHK, _ = self._mix(repeat_rows(self.qkv(rows_UD), index_BT), None, None, None, positions_BT)
        return self.out(y_BTHK.flatten(2))

    def _is_one(self, x_BTD: Tensor, state: AttentionState, documents_BT: Tensor | None) -> bool:
        """Say whether `norm_attention` does what lies between the residual stream and the output projection: of one
        token a row, or of prompts that nothing stands before."""
        if self.turns or documents_BT is not None or torch.is_grad_enabled() or cache.cheap_to_look(state.length_B):
            return False
        return x_BTD.shape[1] <= (state.keys_BCGK.shape[1] if cache.is_known_empty() else 1)

    def _calls_alone(self) -> bool:
        """Say whether `forward` is all that a call does: a mixer made of this one has more to do, and so has one that
        others watch."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return type(self).forward is Attention.forward and not hooks

    def _mix(
        self,
        heads_BTND: Tensor,
        state: AttentionState | None,
        lengths_B: Tensor | None,
        documents_BT: Tensor | None,
        positions_BT: Tensor | None,
    ) -> tuple[Tensor, AttentionState | None]:
        """Return (y_BTHK, state) of the projected heads."""
        batch, tokens = heads_BTND.shape[:2]
        heads_BTHK = heads_BTND.unflatten(-1, (-1, self.head_width))
        q_BTHK, k_BTGK, v_BTGK = heads_BTHK.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if self.rotary_base is not None:
            if positions_BT is None:
                past_B = None if state is None else state.length_B
                positions_BT = count_positions(batch, tokens, heads_BTND.device, past_B, documents_BT)
            q_BTHK = rotate(q_BTHK, positions_BT, self.rotary_base)
            k_BTGK = rotate(k_BTGK, positions_BT, self.rotary_base)
        if state is None and documents_BT is not None:
            return self._whole(q_BTHK, k_BTGK, v_BTGK, documents_BT), None
        if state is None:
            return self._alone(heads_BTHK, q_BTHK, k_BTGK, v_BTGK), None
        if documents_BT is not None:
            raise ValueError("documents_BT: a state continues one document a row; give documents or a state, not both")
        return self._continue(heads_BTHK, q_BTHK, k_BTGK, v_BTGK, state, lengths_B)

    def _alone(self, heads_BTHK: Tensor, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Return y_BTHK of sequences that nothing stands before; `heads_BTHK` are the three as projected."""
        # Heads are put together again for the kernels that want it so.
        kernels = self.packed_backend == "triton" or heads_BTHK.device.type == "cpu"
        if self.turns and not kernels:
            return self._whole(q_BTHK, k_BTGK, v_BTGK, None)
        return packed_attention(
            self._together(heads_BTHK, q_BTHK, k_BTGK, v_BTGK),
            self.kv_heads,
            self.window,
            attention_backend=self.backend,
            backend=self.packed_backend,
        )

    def _together(self, heads_BTHK: Tensor, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        return torch.cat((q_BTHK, k_BTGK, v_BTGK), dim=2) if self.turns else heads_BTHK

    def at(
        self,
        x_BTD: Tensor,
        wanted_N: Tensor,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        if documents_BT is not None or x_BTD.device.type != "cpu":
            return super().at(
                x_BTD, wanted_N, lengths_B=lengths_B, documents_BT=documents_BT, positions_BT=positions_BT
            )
        x_BTD = cache.without_padding(x_BTD, lengths_B)
        cut = self.heads * self.head_width
        weights = self.qkv.weight.split((cut, len(self.qkv.weight) - cut))
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split((cut, len(self.qkv.bias) - cut))
        x_1ND = x_BTD.flatten(0, 1).index_select(0, wanted_N)[None]
        q_1NHK, heads_BTJK = (
            linear(x, weight, bias, backend=self.linear_backend).unflatten(-1, (-1, self.head_width))
            for x, weight, bias in zip((x_1ND, x_BTD), weights, biases, strict=True)
        )
        if self.turns:
            k_BTGK, v_BTGK = heads_BTJK.split(self.kv_heads, dim=2)
            q_1NHK, k_BTGK = self.query_norm(q_1NHK), self.key_norm(k_BTGK)
            if self.rotary_base is not None:
                if positions_BT is None:
                    positions_BT = count_positions(x_BTD.shape[0], x_BTD.shape[1], x_BTD.device)
                places_1N = positions_BT.expand(x_BTD.shape[:2]).flatten().index_select(0, wanted_N)[None]
                q_1NHK = rotate(q_1NHK, places_1N, self.rotary_base)
                k_BTGK = rotate(k_BTGK, positions_BT, self.rotary_base)
            heads_BTJK = torch.cat((k_BTGK, v_BTGK), dim=2)
        y_NHK = packed_attention(
            heads_BTJK,
            self.kv_heads,
            self.window,
            query_MHD=q_1NHK[0],
            places_M=wanted_N,
            attention_backend=self.backend,
            backend=self.packed_backend,
        )
        return self.out(y_NHK.flatten(1))

    def _whole(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, documents_BT: Tensor | None) -> Tensor:
        tokens = q_BTHK.shape[1]
        if documents_BT is None and (self.window is None or self.window >= tokens):
            return attention(q_BTHK, k_BTGK, v_BTGK, backend=self.backend)
        place_1T = torch.arange(tokens, device=q_BTHK.device)[None]
        allowed_BTS = cache.visible(place_1T, place_1T, self.window)
        if documents_BT is not None:
            allowed_BTS = allowed_BTS & (documents_BT[:, :, None] == documents_BT[:, None, :])
        return attention(q_BTHK, k_BTGK, v_BTGK, allowed_BTS, backend=self.backend)

    def _continue(
        self,
        heads_BTHK: Tensor,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        state: AttentionState,
        added_B: Tensor | None,
    ) -> tuple[Tensor, AttentionState]:
        tokens, slots = q_BTHK.shape[1], state.keys_BCGK.shape[1]
        past_B = state.length_B
        if cache.is_known_empty():  # what is left there from before may be NaN, which no weight of 0 keeps out
            for ring in (state.keys_BCGK, state.values_BCGK):
                (ring if tokens > slots else ring[:, tokens:]).zero_()
        cache.check_room(past_B, added_B, tokens, slots, self.window)
        rings, news = [state.keys_BCGK, state.values_BCGK], [k_BTGK, v_BTGK]
        if tokens > 1 and cache.used_slots(past_B, slots) == 0:
            y_BTHK = self._alone(heads_BTHK, q_BTHK, k_BTGK, v_BTGK)
            keys, values = (cache.write(ring, new, past_B, added_B) for ring, new in zip(rings, news, strict=True))
        elif tokens == 1 and not torch.is_grad_enabled():
            y_BHK = cached_step(
                self._together(heads_BTHK, q_BTHK, k_BTGK, v_BTGK)[:, 0],
                state.keys_BCGK,
                state.values_BCGK,
                past_B,
                added_B,
                held=cache.held_slots(past_B, added_B, slots) if cache.cheap_to_look(past_B) else None,
                attention_backend=self.cached_backend,
                backend=self.step_backend,
            )
            return y_BHK[:, None], state
        else:
            query_BT = cache.query_positions(past_B, added_B, tokens)
            (keys, values), (k_BSGK, v_BSGK), position_BS = cache.extend(rings, news, past_B, added_B)
            allowed_BTS = cache.visible(query_BT, position_BS, self.window)
            y_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, allowed_BTS, backend=self.backend)
        return y_BTHK, AttentionState(cache.advance(past_B, added_B, tokens), keys, values)
