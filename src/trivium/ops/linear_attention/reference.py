"""Gated linear attention exactly as its recurrence says (arXiv 2312.06635), one token after the other."""

import torch
from torch import Tensor

from trivium.ops.recurrence import forget_between


def reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (o, state); arguments as in `gated_linear_attention`, checked, with a state in the dtype of the sums."""
    out_dtype = q.dtype
    q, k, v, log_decay = (x.to(state.dtype) for x in (q, k, v, log_decay))
    decay = forget_between(log_decay, documents).exp()
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((scale * q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, dim=1).to(out_dtype), state
