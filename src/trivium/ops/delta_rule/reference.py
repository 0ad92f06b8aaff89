"""The gated delta rule exactly as its recurrence says (arXiv 2412.06464), one token after the other."""

import torch
from torch import Tensor

from trivium.ops.recurrence import forget_between


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (o, state); arguments as in `gated_delta_rule`, checked, with a state in the dtype of the sums."""
    out_dtype = q.dtype
    q, k, v, beta, log_decay = (x.to(state.dtype) for x in (q, k, v, beta, log_decay))
    decay = forget_between(log_decay, documents).exp()
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, None, None] * state
        key_BH1K, value_BH1V = k[:, t, :, None, :], v[:, t, :, None, :]
        wrong_BH1V = value_BH1V - key_BH1K @ state
        state = state + key_BH1K.mT * (beta[:, t, :, None, None] * wrong_BH1V)
        outputs.append((scale * q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, dim=1).to(out_dtype), state
