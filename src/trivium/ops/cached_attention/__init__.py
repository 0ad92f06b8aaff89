"""Softmax attention of one new token a row over its cache: what a step of generation does in each layer.

Shapes: B rows, S slots of the cache, H query heads, G key/value heads, K head width.
"""

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.attention import fused
from trivium.ops.attention import reference as attention_reference
from trivium.ops.simplicial import triton_support as support

_OPERATOR = "cached_attention"


def cached_attention(
    q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, count_B: Tensor | None, *, backend: str = "auto"
) -> Tensor:
    """Return o (B, H, K): the values in the first `count_B` slots (None: in all), at least one, weighted by a softmax.

    Query head h reads key/value head h // (H / G). No value of `count_B` decides what runs. Backend "triton" spreads a
    row's slots over the whole GPU and reads no slot behind the count; it has no gradient and serves by name alone.
    Raises UserError for a backend that is missing or cannot.
    """
    facts = (("dtype", q_BHK.dtype), ("width", q_BHK.shape[-1]), ("gradient", torch.is_grad_enabled()))
    return dispatch.load(_OPERATOR, backend, q_BHK.device.type, facts)(q_BHK, k_BSGK, v_BSGK, count_B)


def _allowed(k_BSGK: Tensor, count_B: Tensor | None) -> Tensor:
    slot_S = torch.arange(k_BSGK.shape[1], device=k_BSGK.device)
    return (slot_S >= 0)[None, None] if count_B is None else (slot_S < count_B[:, None])[:, None]


def reference(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, count_B: Tensor | None) -> Tensor:
    """Return o (B, H, K) as the formula says, in float32, or float64 for float64 inputs."""
    return attention_reference(q_BHK[:, None], k_BSGK, v_BSGK, _allowed(k_BSGK, count_B))[:, 0]


def by_sdpa(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, count_B: Tensor | None) -> Tensor:
    """Return o (B, H, K) from PyTorch's scaled_dot_product_attention, without a mask where all slots are read."""
    if count_B is None and k_BSGK.shape[1]:
        # One query that reads every key needs no mask, and PyTorch's fastest kernels take none.
        o_BHTK = torch.nn.functional.scaled_dot_product_attention(
            q_BHK[:, :, None],
            k_BSGK.transpose(1, 2),
            v_BSGK.transpose(1, 2),
            enable_gqa=k_BSGK.shape[2] != q_BHK.shape[1],
        )
        return o_BHTK[:, :, 0]
    return fused(q_BHK[:, None], k_BSGK, v_BSGK, _allowed(k_BSGK, count_B))[:, 0]


def _load_triton():
    from trivium.ops.cached_attention.triton_split import by_triton

    return by_triton


def _triton_refuses(facts):
    if facts.get("gradient"):
        return "it has no gradient, and gradients are on"
    return support.refuses({name: facts[name] for name in ("dtype", "width") if name in facts})


dispatch.register(_OPERATOR, "reference", dispatch.Backend(lambda: reference))
dispatch.register(
    _OPERATOR,
    "torch",
    dispatch.Backend(
        lambda: by_sdpa,
        suits=lambda device_type: f"PyTorch's scaled_dot_product_attention, which picks its kernel on {device_type}",
    ),
)
dispatch.register(
    _OPERATOR,
    "triton",
    dispatch.Backend(
        _load_triton,
        missing=support.missing,
        refuses=_triton_refuses,  # and "auto" leaves it until it has been checked and timed on a GPU
    ),
)
