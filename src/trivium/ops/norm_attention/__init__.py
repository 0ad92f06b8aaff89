"""A norm, the projection to queries, keys and values, and causal attention from a cache that takes the new tokens, for
passes without gradients: what generation does to a token before the output projection.

Shapes: B rows, T new tokens, D width of a token, H query heads, G key/value heads, K head width, S slots of the cache.
Position p of a row lies in slot p mod S.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trivium.ops import dispatch
from trivium.ops.cached_attention.step import cached_step, copy_into
from trivium.ops.fused_linear import norm_linear, refuses
from trivium.ops.packed_attention import packed_attention
from trivium.ops.simplicial import triton_support

__all__ = ["LONGEST", "Parts", "norm_attention"]

# Tokens of a prompt, slots of a cache, numbers of a token and of a head that one program has.
LONGEST, WIDEST, WIDEST_HEAD = 64, 512, 64


class Parts(NamedTuple):
    """The backends of what the operator does one by one."""

    norm_linear: str = "auto"
    packed_attention: str = "auto"
    attention: str = "auto"
    cached_step: str = "auto"
    cached_attention: str = "auto"


AUTO = Parts()


def norm_attention(
    x_BTD: Tensor,
    norm: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    keys_BSGK: Tensor,
    values_BSGK: Tensor,
    length_B: Tensor,
    added_B: Tensor | None,
    *,
    window: int | None = None,
    empty: bool = False,
    backend: str = "auto",
    parts: Parts = AUTO,
) -> Tensor:
    """Return o (B, T, H, K) of norm(x) weight^T + bias, whose rows are queries, then keys, then values, head by head.

    In place, keys and values go into the cache and `length_B` counts the tokens: of one token a row (T = 1) as
    `cached_step` says. With `empty` no row has seen a token, whatever the cache holds, and T
    tokens of every row go into its first slots; `added_B` counts a row's own, and what lies behind them is not read.
    Backend "torch" calls `norm_linear` and `cached_step` or `packed_attention` with the backends of `parts`; "triton"
    is for 16 bits and short caches: a step of few rows is one kernel, and a prompt's attention fills the cache. Raises
    ValueError for T > 1 without `empty` or beyond the cache, UserError for a backend that is missing or cannot.
    """
    tokens, slots = x_BTD.shape[1], keys_BSGK.shape[1]
    if tokens > (slots if empty else 1):
        raise ValueError(f"norm_attention: {tokens} tokens a row, empty={empty}, and {slots} slots")
    same = x_BTD.dtype == weight.dtype == keys_BSGK.dtype == values_BSGK.dtype
    fits = max(slots, tokens) <= LONGEST and x_BTD.shape[2] <= WIDEST and keys_BSGK.shape[3] <= WIDEST_HEAD
    facts = (
        ("dtype", x_BTD.dtype),
        ("one dtype", "yes" if same else "no"),
        ("gradient", torch.is_grad_enabled()),
        ("norm", type(norm).__name__),
        ("fits", "yes" if fits else "no"),
        ("parts", "auto" if set(parts) == {"auto"} else "named"),
    )
    function = dispatch.load("norm_attention", backend, x_BTD.device.type, facts)
    cache = keys_BSGK, values_BSGK, length_B, added_B
    return function(x_BTD, norm, weight, bias, *cache, window, empty, parts)


def _by_parts(
    x_BTD: Tensor,
    norm: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    keys_BSGK: Tensor,
    values_BSGK: Tensor,
    length_B: Tensor,
    added_B: Tensor | None,
    window: int | None,
    empty: bool,
    parts: Parts,
) -> Tensor:
    tokens, (kv_heads, width) = x_BTD.shape[1], keys_BSGK.shape[2:]
    heads_BTND = norm_linear(x_BTD, norm, weight, bias, backend=parts.norm_linear)
    heads_BTNK = heads_BTND.unflatten(-1, (-1, width))
    if empty:  # what is left there from before may be NaN, which no weight of 0 keeps out
        for ring in (keys_BSGK, values_BSGK):
            ring[:, tokens:].zero_()
    if tokens == 1:
        kept = keys_BSGK, values_BSGK, length_B, added_B
        named, within = parts.cached_step, parts.cached_attention
        return cached_step(heads_BTNK[:, 0], *kept, attention_backend=within, backend=named)[:, None]
    named, within = parts.packed_attention, parts.attention
    o_BTHK = packed_attention(heads_BTNK, kv_heads, window, attention_backend=within, backend=named)
    news = heads_BTNK[:, :, -2 * kv_heads :].split(kv_heads, dim=2)
    for ring, new in zip((keys_BSGK, values_BSGK), news, strict=True):
        copy_into(ring[:, :tokens], new.to(ring.dtype))
    length_B.copy_(torch.full_like(length_B, tokens) if added_B is None else added_B)
    return o_BTHK


def _reference(*arguments: Any) -> Tensor:
    by_parts: Any = _by_parts
    return by_parts(*arguments[:-1], Parts(*["reference"] * len(Parts._fields)))


def _refuses(facts: Mapping[str, Any]) -> str | None:
    named = refuses(facts)
    if named is None and facts.get("fits", "yes") == "no":
        named = f"more than {LONGEST} tokens or slots, or wider than {WIDEST} or heads than {WIDEST_HEAD}"
    if named is None and facts.get("parts", "auto") == "named":
        named = "an operator that it stands for is asked for by name"
    return named


def _load_triton() -> Callable[..., Tensor]:
    from trivium.ops.norm_attention.launch import by_triton

    return by_triton


dispatch.register("norm_attention", "reference", dispatch.Backend(lambda: _reference))
dispatch.register(
    "norm_attention",
    "torch",
    dispatch.Backend(lambda: _by_parts, suits=lambda device_type: "norm_linear and attention, one after the other"),
)
dispatch.register(
    "norm_attention",
    "triton",
    dispatch.Backend(_load_triton, missing=triton_support.missing, suits=triton_support.suits, refuses=_refuses),
)
