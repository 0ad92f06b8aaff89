"""Causal softmax attention of whole sequences, by the formula, by PyTorch's operator, and by our kernels in C.

Training asks for the outputs of scored tokens alone: then the queries of those come by themselves, with their places.

Shapes: B rows, T tokens, N queries, H query heads, G key/value heads, K head width, J heads of all kinds.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.attention import fused
from trivium.ops.attention import reference as formula
from trivium.ops.native.support import missing, refuses, suits


def causal_attention(
    heads_BTJK: Tensor,
    query_NHK: Tensor | None = None,
    places_N: Tensor | None = None,
    *,
    heads: int,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return o (B, T, H, K): for each token the values of those up to it, weighted by a softmax.

    `heads_BTJK` holds the H query heads, then the keys and then the values of all G, as one projection gives them.
    With `query_NHK` it holds keys and values alone, and o (N, H, K) comes back: query n reads as the token at
    `places_N` (int64) of the flattened B*T does. Query head h reads key/value head h // (H / G). `window` is how many
    tokens a query reads, itself included. Raises UserError for a backend that is missing.
    """
    if (query_NHK is None) != (places_N is None):
        raise ValueError("query_NHK and places_N: give both or neither")
    facts = (("dtype", str(heads_BTJK.dtype).removeprefix("torch.")),)
    function = dispatch.load("causal_attention", backend, heads_BTJK.device.type, facts)
    return function(heads_BTJK, query_NHK, places_N, heads, window)


def _masked(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Callable[[Tensor, Tensor | None, Tensor | None, int, int | None], Tensor]:
    """Return causal attention by a function that attends where a mask allows it, or causally without one."""

    def causal(
        heads_BTJK: Tensor, query_NHK: Tensor | None, places_N: Tensor | None, heads: int, window: int | None
    ) -> Tensor:
        batch, tokens, kinds, width = heads_BTJK.shape
        count = heads if query_NHK is None else 0
        kv_heads = (kinds - count) // 2
        q_BTHK, k_BTGK, v_BTGK = heads_BTJK.split((count, kv_heads, kv_heads), dim=2)
        if query_NHK is not None:
            assert places_N is not None
            q_BTHK = query_NHK.new_zeros(batch * tokens, heads, width)
            q_BTHK = q_BTHK.index_copy(0, places_N, query_NHK).view(batch, tokens, heads, width)
        allowed_1TT = None
        if window is not None and window < tokens:
            behind_TT = torch.arange(tokens, device=heads_BTJK.device)
            behind_TT = behind_TT[:, None] - behind_TT
            allowed_1TT = ((behind_TT >= 0) & (behind_TT < window))[None]
        o_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, allowed_1TT)
        return o_BTHK if places_N is None else o_BTHK.flatten(0, 1).index_select(0, places_N)

    return causal


def _native() -> Callable[..., Tensor]:
    from trivium.ops.native.attention import native

    def causal(heads_BTJK: Tensor, query_NHK: Tensor | None, places_N: Tensor | None, heads: int, window: int | None):
        o_NHK = native(heads_BTJK, query_NHK, places_N, heads, window)
        return o_NHK if query_NHK is not None else o_NHK.unflatten(0, heads_BTJK.shape[:2])

    return causal


dispatch.register("causal_attention", "reference", dispatch.Backend(lambda: _masked(formula)))
dispatch.register(
    "causal_attention",
    "torch",
    dispatch.Backend(
        lambda: _masked(fused),
        suits=lambda device_type: f"PyTorch's scaled_dot_product_attention, which picks its kernel on {device_type}",
    ),
)
dispatch.register(
    "causal_attention", "native", dispatch.Backend(_native, missing=missing, suits=suits, refuses=refuses)
)
