"""The gated delta rule (arXiv 2412.06464): a decaying matrix of memory that is corrected, not just added to."""

from torch import Tensor

from trivium.ops.recurrence import compute, fla_backward_lacks, fla_backward_refuses, fla_backward_slower, register

__all__ = ["gated_delta_rule"]


def _load_reference():
    from trivium.ops.delta_rule.reference import reference

    return reference


def _load_chunked():
    from trivium.ops.delta_rule.chunked import chunked

    return chunked


def _load_fla():
    from trivium.ops.delta_rule.fla import by_fla

    return by_fla


register(
    "gated_delta_rule",
    _load_reference,
    _load_chunked,
    _load_fla,
    fla_backward_refuses,
    fla_backward_lacks,
    fla_backward_slower,
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
    sums. `documents` are integer ids (B, T), or offsets (see `trivium.ops.document_ids`): where the id changes the
    memory starts empty, so that `state` belongs to a row's first document and the returned one to its last. The
    backends are "reference" (one token after the other), "torch" (chunked) and "fla" (flash-linear-attention's
    kernels, on a CUDA device). In float64 "auto" takes "torch", which alone keeps it. Raises ValueError for arguments
    that disagree and UserError for a backend that is missing or cannot.
    """
    gates = {name: (gate, tuple(q.shape[:3])) for name, gate in (("beta", beta), ("log_decay", log_decay))}
    return compute("gated_delta_rule", q, k, v, gates, scale=scale, state=state, documents=documents, backend=backend)
