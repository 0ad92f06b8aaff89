"""Softmax attention (arXiv 1706.03762) by PyTorch's own operator, and by its formula.

Shapes: B rows, T queries, S keys, H query heads, G key/value heads, K head width.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trivium.ops import dispatch


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, allowed_BTS: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return o (B, T, H, K): for each query the values of the keys that it may read, weighted by a softmax.

    Query head h reads key/value head h // (H / G). `allowed_BTS` (B may be 1) says which keys a query may read, at
    least one each; without it queries and keys are of equal length and each reads what is not behind it. Raises
    UserError for a backend that is missing.
    """
    return dispatch.load("attention", backend, q_BTHK.device.type)(q_BTHK, k_BSGK, v_BSGK, allowed_BTS)


def reference(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, allowed_BTS: Tensor | None) -> Tensor:
    """Return o (B, T, H, K) as the formula says, in float32, or float64 for float64 inputs."""
    wide = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    groups, tokens = q_BTHK.shape[2] // k_BSGK.shape[2], q_BTHK.shape[1]
    if allowed_BTS is None:
        allowed_BTS = torch.ones(1, tokens, tokens, dtype=torch.bool, device=q_BTHK.device).tril()
    with torch.autocast(q_BTHK.device.type, enabled=False):
        q, k, v = q_BTHK.to(wide), *(x.to(wide).repeat_interleave(groups, dim=2) for x in (k_BSGK, v_BSGK))
        logits = q.shape[-1] ** -0.5 * torch.einsum("bthk,bshk->bhts", q, k)
        weights = logits.masked_fill(~allowed_BTS[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshk->bthk", weights, v).to(q_BTHK.dtype)


def fused(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, allowed_BTS: Tensor | None) -> Tensor:
    """Return o (B, T, H, K) from scaled_dot_product_attention."""
    o_BHTK = scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=None if allowed_BTS is None else allowed_BTS[:, None],
        is_causal=allowed_BTS is None,
        enable_gqa=k_BSGK.shape[2] != q_BTHK.shape[2],
    )
    return o_BHTK.transpose(1, 2)


dispatch.register("attention", "reference", dispatch.Backend(lambda: reference))
dispatch.register(
    "attention",
    "torch",
    dispatch.Backend(
        lambda: fused,
        suits=lambda device_type: f"PyTorch's scaled_dot_product_attention, which picks its kernel on {device_type}",
    ),
)
