"""Gated linear attention (arXiv 2312.06635): a matrix of memory with a decay of its own for each key channel."""

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.recurrence import check_recurrence, facts, fla_missing, fla_refuses, fla_suits, wide_dtype

__all__ = ["gated_linear_attention"]

_OPERATOR = "gated_linear_attention"


def _load_reference():
    from trivium.ops.linear_attention.reference import reference

    return reference


def _load_chunked():
    from trivium.ops.linear_attention.chunked import chunked

    return chunked


def _load_fla():
    from trivium.ops.linear_attention.fla import by_fla

    return by_fla


dispatch.register(_OPERATOR, "reference", dispatch.Backend(_load_reference))
dispatch.register(
    _OPERATOR,
    "torch",
    dispatch.Backend(_load_chunked, suits=lambda device_type: f"plain PyTorch, chunked, runs on {device_type}"),
)
dispatch.register(
    _OPERATOR,
    "fla",
    dispatch.Backend(_load_fla, missing=fla_missing, suits=fla_suits, refuses=fla_refuses),
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (o, state): o (B, T, H, V) reads S_t = diag(exp g_t) S_{t-1} + k_t v_t^T as o_t = scale * q_t S_t.

    q and k are (B, T, H, K), v is (B, T, H, V); `log_decay` g is (B, T, H, K), at most 0, and -inf forgets. `scale`
    defaults to K^-1/2. `state` (B, H, K, V) is S before the first token (default: zeros) and is not changed; S after
    the last token comes back in float32, or float64 for float64 inputs, the precision of all sums. `documents` (B, T)
    integer ids: where the id changes the memory starts empty, so that `state` belongs to a row's first document and
    the returned one to its last. The backends are "reference" (one token after the other), "torch" (chunked) and
    "fla" (flash-linear-attention's kernels, on a CUDA device). In float64 "auto" takes "torch", which alone keeps it.
    Raises ValueError for arguments that disagree and UserError for a backend that is missing or cannot.
    """
    check_recurrence(q, k, v, {"log_decay": (log_decay, tuple(q.shape))}, state, documents)
    function = dispatch.load(_OPERATOR, backend, q.device.type, facts(q))
    wide = wide_dtype(q.dtype)
    if state is None:
        state = torch.zeros(q.shape[0], *q.shape[2:], v.shape[3], dtype=wide, device=q.device)
    if v.numel() == 0:
        return torch.zeros_like(v), state.to(wide)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):
        return function(q, k, v, log_decay, scale=scale, state=state.to(wide), documents=documents)
