"""Causal self-attention (arXiv 1706.03762) of short sequences, whose queries, keys and values lie in one tensor.

Kernels made for long sequences cut them into tiles of 64 tokens and more, of which a sequence of 18 fills a quarter;
and gradients that come back in one tensor need not be put together.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.attention import attention
from trivium.ops.native import support
from trivium.ops.simplicial import triton_support

__all__ = ["LONGEST", "WIDEST", "packed_attention"]

LONGEST = 64  # tokens of which one program of a GPU holds all scores
WIDEST = 128  # channels of a head that a tile holds
_ROOM = {2: 8192, 4: 2048}  # channels of all of them that it has registers for, by the bytes of one


def packed_attention(
    x_BTND: Tensor,
    kv_heads: int,
    window: int | None = None,
    *,
    query_MHD: Tensor | None = None,
    places_M: Tensor | None = None,
    attention_backend: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Return o (B, T, H, D) of x, whose N = H + 2 G heads are the queries, then G keys, then G values.

    Query head h reads key head h // (H / G), up to itself and the last `window` tokens (None: all). With `query_MHD`
    x holds keys and values alone and o (M, H, D) comes back: query m reads as the token at `places_M` (int64, of the
    flattened B*T) does. Training scores answers: in the last layer nothing reads what other tokens would ask.

    The backends are "torch" and "reference", which call `attention` with its backend or its reference, "native" on a
    CPU, and "triton", for at most LONGEST tokens on a GPU. Raises UserError for a backend that is
    missing or cannot.
    """
    if (query_MHD is None) != (places_M is None):
        raise ValueError("query_MHD and places_M: give both or neither")
    tokens, width = x_BTND.shape[1], x_BTND.shape[3]
    fits = "yes" if fits_registers(tokens, width, x_BTND.dtype) else "no"
    alone = "no" if query_MHD is None else "yes"
    device = x_BTND.device.type
    facts = (
        ("dtype", x_BTND.dtype),
        ("device", device),
        ("fits", fits),
        ("attention", attention_backend),
        ("alone", alone),
    )
    function = dispatch.load("packed_attention", backend, device, facts)
    if query_MHD is None:
        return function(x_BTND, kv_heads, window, attention_backend)
    return function(x_BTND, kv_heads, window, attention_backend, query_MHD, places_M)


def fits_registers(tokens: int, width: int, dtype: torch.dtype) -> bool:
    """Say whether one program of a GPU holds so many tokens' heads of `width` channels."""
    return tokens <= LONGEST and width <= WIDEST and tile(tokens) * width <= _ROOM.get(dtype.itemsize, 0)


def tile(count: int) -> int:
    """Return the least power of two, 16 to WIDEST, that holds `count`."""
    return 16 if count <= 16 else 32 if count <= 32 else 64 if count <= 64 else 128


def _reference(x_BTND: Tensor, kv_heads: int, window: int | None, backend: str, *alone: Tensor) -> Tensor:
    return _by_attention(x_BTND, kv_heads, window, "reference", *alone)


def _by_attention(
    x_BTND: Tensor,
    kv_heads: int,
    window: int | None,
    backend: str,
    query_MHD: Tensor | None = None,
    places_M: Tensor | None = None,
) -> Tensor:
    tokens, packed = x_BTND.shape[1:3]
    if query_MHD is not None and places_M is not None:
        q_BTHD = query_MHD.new_zeros(x_BTND.shape[0] * tokens, *query_MHD.shape[1:])
        q_BTHD = q_BTHD.index_copy(0, places_M, query_MHD).unflatten(0, x_BTND.shape[:2])
        o_BTHD = _by_attention(torch.cat((q_BTHD, x_BTND), dim=2), kv_heads, window, backend)
        return o_BTHD.flatten(0, 1).index_select(0, places_M)
    q_BTHD, k_BTGD, v_BTGD = x_BTND.split((packed - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    if window is None or window >= tokens:
        return attention(q_BTHD, k_BTGD, v_BTGD, backend=backend)
    age_TT = torch.arange(tokens, device=x_BTND.device)[:, None] - torch.arange(tokens, device=x_BTND.device)
    return attention(q_BTHD, k_BTGD, v_BTGD, ((age_TT >= 0) & (age_TT < window))[None], backend=backend)


def _load_native():
    from trivium.ops.native.attention import native

    return native


def _load_triton():
    from trivium.ops.packed_attention.launch import triton_packed

    return triton_packed


def _refuses_named(facts: Mapping[str, Any]) -> str | None:
    return None if facts.get("attention", "auto") == "auto" else f"attention is asked for from {facts['attention']}"


def _refuses(facts: Mapping[str, Any]) -> str | None:
    named = _refuses_named(facts)
    if named is not None:
        return named
    if facts.get("alone", "no") == "yes":
        return "queries that come alone"
    if facts.get("dtype", triton_support.DTYPES[0]) not in triton_support.DTYPES:
        return f"dtype {facts['dtype']}; allowed: bfloat16, float16, float32"
    if facts.get("fits", "yes") == "no":
        return f"more than {LONGEST} tokens, or heads too wide to hold them all"
    return None


dispatch.register("packed_attention", "reference", dispatch.Backend(lambda: _reference))
dispatch.register(
    "packed_attention",
    "torch",
    dispatch.Backend(lambda: _by_attention, suits=lambda device_type: f"the operator attention on {device_type}"),
)
dispatch.register(
    "packed_attention",
    "native",
    dispatch.Backend(
        _load_native,
        missing=support.missing,
        suits=support.suits,
        refuses=lambda facts: _refuses_named(facts) or support.refuses(facts),
    ),
)
dispatch.register(
    "packed_attention",
    "triton",
    dispatch.Backend(
        _load_triton,
        missing=triton_support.missing,
        suits=triton_support.suits,
        refuses=_refuses,
    ),
)
