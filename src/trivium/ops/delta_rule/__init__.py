"""The gated delta rule (arXiv 2412.06464): a decaying matrix of memory that is corrected, not just added to."""

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.recurrence import check_recurrence, facts, fla_missing, fla_refuses, fla_suits, wide_dtype

__all__ = ["gated_delta_rule"]

_OPERATOR = "gated_delta_rule"


def _load_reference():
    from trivium.ops.delta_rule.reference import reference

    return reference


def _load_chunked():
    from trivium.ops.delta_rule.chunked import chunked

    return chunked


def _load_fla():
    from trivium.ops.delta_rule.fla import by_fla

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


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (o, state): o (B, T, H, V) reads the memory S_t as o_t = scale * q_t S_t, where

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T.

    q and k are (B, T, H, K), v is (B, T, H, V), `beta` and `log_decay` g are (B, T, H); g is at most 0, and -inf
    forgets. Keys should have length 1: then the factor of S has the eigenvalue 1 - beta, in (-1, 1) for beta in
    (0, 2), along k. `scale` defaults to K^-1/2. `state` (B, H, K, V) is S before the first token (default: zeros) and
    is not changed; S after the last token comes back in float32, or float64 for float64 inputs, the precision of all
    sums. `documents` (B, T) integer ids: where the id changes the memory starts empty, so that `state` belongs to a
    row's first document and the returned one to its last. The backends are "reference" (one token after the other),
    "torch" (chunked) and "fla" (flash-linear-attention's kernels, on a CUDA device). In float64 "auto" takes "torch",
    which alone keeps it. Raises ValueError for arguments that disagree and UserError for a backend that is missing or
    cannot.
    """
    gates = {name: (gate, tuple(q.shape[:3])) for name, gate in (("beta", beta), ("log_decay", log_decay))}
    check_recurrence(q, k, v, gates, state, documents)
    function = dispatch.load(_OPERATOR, backend, q.device.type, facts(q))
    wide = wide_dtype(q.dtype)
    if state is None:
        state = torch.zeros(q.shape[0], *q.shape[2:], v.shape[3], dtype=wide, device=q.device)
    if v.numel() == 0:
        return torch.zeros_like(v), state.to(wide)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):
        return function(q, k, v, beta, log_decay, scale=scale, state=state.to(wide), documents=documents)
