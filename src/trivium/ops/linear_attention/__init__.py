"""Gated linear attention (arXiv 2312.06635): a matrix of memory with a decay of its own for each key channel."""

from torch import Tensor

from trivium.ops.recurrence import compute, fla_refuses, register

__all__ = ["gated_linear_attention"]


def _load_reference():
    from trivium.ops.linear_attention.reference import reference

    return reference


def _load_chunked():
    from trivium.ops.linear_attention.chunked import chunked

    return chunked


def _load_fla():
    from trivium.ops.linear_attention.fla import by_fla

    return by_fla


register("gated_linear_attention", _load_reference, _load_chunked, _load_fla, fla_refuses)


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
    the last token comes back in float32, or float64 for float64 inputs, the precision of all sums. `documents` are
    integer ids (B, T), or offsets (see `trivium.ops.document_ids`): where the id changes the memory starts empty, so
    that `state` belongs to a row's first document and the returned one to its last. The backends are "reference" (one
    token after the other), "torch" (chunked) and "fla" (flash-linear-attention's kernels, on a CUDA device). In
    float64 "auto" takes "torch", which alone keeps it. Raises ValueError for arguments that disagree and UserError
    for a backend that is missing or cannot.
    """
    gates = {"log_decay": (log_decay, tuple(q.shape))}
    return compute(
        "gated_linear_attention", q, k, v, gates, scale=scale, state=state, documents=documents, backend=backend
    )
