"""2-simplicial attention as a mixer (arXiv 2507.02754): each query reads pairs of tokens within two windows.

Shapes: B rows, T tokens, D width, H query heads, G key/value heads, K head width, C slots, S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trivium.mixers import cache
from trivium.mixers.base import MIXERS, Mixer, MixerConfig, MixerContext, State
from trivium.mixers.heads import HeadNorm, check_count, num_kv_heads
from trivium.mixers.rotary import count_positions, rotate, rotate_triples
from trivium.ops import simplicial_attention, simplicial_decode
from trivium.ops.linear import Linear
from trivium.ops.pairs import allowed_pairs
from trivium.registry import UserError


@MIXERS.register("simplicial")
@dataclass(frozen=True)
class SimplicialConfig(MixerConfig):
    """2-simplicial attention (arXiv 2507.02754): a softmax over pairs of tokens, weighted by a three-way product."""

    window1: int = 512
    """How many tokens a query reads as the first of a pair, itself included."""
    window2: int = 32
    """How many tokens a query reads as the second of a pair, itself included."""
    kv_heads: int | None = None
    """Key/value heads that the query heads share in equal groups; null gives each its own."""
    form: Literal["trilinear", "determinant", "factorized"] = "trilinear"
    """Three-way product, sum of 3x3 determinants, or product of two softmaxes (a control without a three-way logit)."""
    rotary: bool = False
    """Turn q and both keys by their positions: relative for determinant and factorized; no scheme is for trilinear."""
    qk_norm: bool = False
    """Normalise queries and both keys (RMS over the head width) before their product."""
    bias: bool = False
    """Add a bias to the projections, as GPT-2 does."""
    pair_bias: bool = False
    """Learn a vector added to k2 (from 1/head width) and one added to v2 (from 1) in each head, as the paper does."""

    def __post_init__(self):
        for name in ("window1", "window2", "kv_heads"):
            check_count(name, getattr(self, name))
        if self.pair_bias and self.form == "factorized":
            raise UserError("pair_bias: the factorized form has no second value to add it to; give false")

    def build(self, context: MixerContext) -> "Simplicial":
        return Simplicial(self, context)

    def num_params(self, context: MixerContext) -> int:
        inner, outer = _widths(self, context)
        weights = context.width * (inner + outer)
        biases = inner + context.width if self.bias else 0
        norms = 3 * context.head_width if self.qk_norm else 0
        pair = 2 * num_kv_heads(context, self.kv_heads) * context.head_width if self.pair_bias else 0
        return weights + biases + norms + pair

    def flops_per_token(self, context: MixerContext, length: int) -> float:
        """Count 4 K for each allowed (head, j, k) in every three-way form, as the paper quotes it."""
        inner, outer = _widths(self, context)
        if self.form == "factorized":
            windows = (self.window1, self.window2, min(self.window1, self.window2))
            flops = sum(2 * allowed_pairs(length, window) for window in windows)
        else:
            flops = 4 * allowed_pairs(length, self.window1, self.window2)
        return 2 * context.width * (inner + outer) + context.heads * context.head_width * flops / max(length, 1)

    def state_bytes(self, context: MixerContext, length: int, dtype: torch.dtype) -> int:
        kv_width = num_kv_heads(context, self.kv_heads) * context.head_width
        return sum(_slots(self, length)) * kv_width * dtype.itemsize + torch.int64.itemsize

    def equals_at(self, other: MixerConfig, length: int) -> bool:
        """Swapping the windows gives the same family of functions, unless a pair bias tells the two sides apart."""
        if not isinstance(other, SimplicialConfig) or type(other) is not type(self):
            return False
        return _canonical(self, length) == _canonical(other, length)

    @classmethod
    def examples(cls) -> Sequence["SimplicialConfig"]:
        return [
            cls(),
            cls(window1=5, window2=2, kv_heads=2, bias=True, pair_bias=True),
            cls(window1=1, window2=4, form="determinant", qk_norm=True),
            cls(window1=6, window2=3, kv_heads=1, form="determinant", rotary=True),
            cls(window1=3, window2=5, form="factorized", rotary=True),
            cls(window1=4, window2=1, kv_heads=2, form="factorized"),
            cls(window1=2, window2=7, rotary=True, pair_bias=True),
        ]


def _canonical(config: SimplicialConfig, length: int) -> tuple[object, ...]:
    windows = (min(config.window1, length), min(config.window2, length))
    ordered = windows if config.pair_bias else tuple(sorted(windows))
    return ordered, config.kv_heads, config.form, config.rotary, config.qk_norm, config.bias, config.pair_bias


def _widths(config: SimplicialConfig, context: MixerContext) -> tuple[int, int]:
    """Return the widths of all projections in, and of the heads' outputs."""
    shared = 3 if config.form == "factorized" else 4
    heads = context.heads + shared * num_kv_heads(context, config.kv_heads)
    return heads * context.head_width, context.heads * context.head_width


def _slots(config: SimplicialConfig, max_length: int) -> list[int]:
    """Return the slots of k1, k2, v1 and, but for the factorized form, v2."""
    slots1, slots2 = (cache.capacity(window, max_length) for window in (config.window1, config.window2))
    # The product of two softmaxes is zero where either window ends: older values are never read.
    return [slots1, slots2, min(slots1, slots2)] if config.form == "factorized" else [slots1, slots2, slots1, slots2]


@dataclass
class SimplicialState(State):
    """Tokens seen, and rings of the last k1, k2, v1 and v2 (not if factorized) of each row."""

    length_B: Tensor
    rings_BCGK: list[Tensor]


class Simplicial(Mixer):
    """See SimplicialConfig. `qkv` holds the rows of q, then k1, k2, v1 and v2 (not if factorized), head by head.

    Whole sequences are served by the operator "simplicial", what continues a state by "simplicial_decode".
    """

    def __init__(self, config: SimplicialConfig, context: MixerContext):
        super().__init__()
        self.config, self.heads = config, context.heads
        self.kv_heads, self.head_width = num_kv_heads(context, config.kv_heads), context.head_width
        self.backend, self.decode_backend = (context.backend(name) for name in ("simplicial", "simplicial_decode"))
        self.rotary_base = context.rotary_base if config.rotary else None
        if config.form == "determinant" and self.head_width < 3:
            raise UserError(
                f"form: determinant needs a head width of at least 3, {context.width}/{context.heads} is less"
            )
        if config.rotary and config.form != "determinant" and self.head_width % 2:
            raise UserError(f"rotary: needs an even head width, {context.width}/{context.heads} is odd")
        inner, outer = _widths(config, context)
        products = context.backend("linear")
        self.qkv = Linear(context.width, inner, bias=config.bias, backend=products)
        self.out = Linear(outer, context.width, bias=config.bias, backend=products)
        norms = (HeadNorm(self.head_width) if config.qk_norm else nn.Identity() for _ in range(3))
        self.query_norm, self.key1_norm, self.key2_norm = norms
        self.pair_bias_2GK = None
        if config.pair_bias:
            start_2 = torch.tensor([1 / self.head_width, 1.0])[:, None, None]
            self.pair_bias_2GK = nn.Parameter(start_2.repeat(1, self.kv_heads, self.head_width))

    def init_state(
        self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> SimplicialState:
        dtype = cache.dtype_of(dtype, device)
        rings = [
            torch.zeros(batch, slots, self.kv_heads, self.head_width, device=device, dtype=dtype)
            for slots in _slots(self.config, max_length)
        ]
        return SimplicialState(torch.zeros(batch, dtype=torch.int64, device=device), rings)

    def forward(
        self,
        x_BTD: Tensor,
        state: SimplicialState | None = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, SimplicialState | None]:
        if state is not None and documents_BT is not None:
            raise ValueError("documents_BT: a state continues one document a row; give documents or a state, not both")
        batch, tokens, _ = x_BTD.shape
        heads_BTHK = self.qkv(cache.without_padding(x_BTD, lengths_B)).unflatten(-1, (-1, self.head_width))
        shared = heads_BTHK.shape[2] - self.heads
        q, shared_BTHK = heads_BTHK.split((self.heads, shared), dim=2)
        k1, k2, v1, v2 = [*shared_BTHK.split(self.kv_heads, dim=2), None][:4]
        q, k1, k2 = self.query_norm(q), self.key1_norm(k1), self.key2_norm(k2)
        if self.rotary_base is not None:
            if positions_BT is None:
                past_B = None if state is None else state.length_B
                positions_BT = count_positions(batch, tokens, x_BTD.device, past_B, documents_BT)
            turn = rotate_triples if self.config.form == "determinant" else rotate
            q, k1, k2 = (turn(x, positions_BT, self.rotary_base) for x in (q, k1, k2))
        if state is None:
            bias = None if self.pair_bias_2GK is None else (self.pair_bias_2GK[0], self.pair_bias_2GK[1])
            y_BTHK = self._operator(q, k1, k2, v1, v2, bias=bias, documents=documents_BT)
            return self.out(y_BTHK.flatten(2)), None
        news = [x for x in (k1, k2, v1, v2) if x is not None]
        if self.pair_bias_2GK is not None:
            news[1], news[3] = (news[i] + bias.to(q.dtype) for i, bias in zip((1, 3), self.pair_bias_2GK, strict=True))
        y_BTHK, state = self._continue(q, news, state, lengths_B)
        return self.out(y_BTHK.flatten(2)), state

    def _continue(
        self, q: Tensor, news: list[Tensor], state: SimplicialState, added_B: Tensor | None
    ) -> tuple[Tensor, SimplicialState]:
        past_B, tokens, windows = state.length_B, q.shape[1], (self.config.window1, self.config.window2)
        rings = state.rings_BCGK
        for ring, window in zip(rings, windows, strict=False):
            cache.check_room(past_B, added_B, tokens, ring.shape[1], window)
        if tokens > 1 and cache.used_slots(past_B, 1) == 0:
            y_BTHK = self._operator(q, *news)
            written = [cache.write(ring, new, past_B, added_B) for ring, new in zip(rings, news, strict=True)]
        else:
            written, held, lengths_B = cache.append(rings, news, past_B, added_B)
            k1, k2, v1, v2 = [*held, None][:4]
            y_BTHK = simplicial_decode(
                *(q, k1, k2, v1, v2, lengths_B),
                window1=self.config.window1,
                window2=self.config.window2,
                form=self.config.form,
                backend=self.decode_backend,
            )
        return y_BTHK, SimplicialState(cache.advance(past_B, added_B, tokens), written)

    def _operator(
        self,
        q: Tensor,
        k1: Tensor,
        k2: Tensor,
        v1: Tensor,
        v2: Tensor | None = None,
        *,
        bias: tuple[Tensor, Tensor] | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        return simplicial_attention(
            q,
            k1,
            k2,
            v1,
            v2,
            window1=self.config.window1,
            window2=self.config.window2,
            form=self.config.form,
            bias=bias,
            documents=documents,
            backend=self.backend,
        )
