"""Gated linear attention by the kernels of flash-linear-attention (version 0.6 or later), on a CUDA device."""

import torch
from torch import Tensor

from trivium.ops.recurrence import import_fla, in_packed_rows


def by_fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (o, state); arguments as in the reference, float32 or less."""
    gla = import_fla("fla.ops.gla")
    # A few tokens are not worth a chunk; the recurrent kernel reads them one after the other.
    recurrent = q.shape[1] <= 16 and not torch.is_grad_enabled()

    def kernel(tensors: list[Tensor], state: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = tensors
        gate = {"gk": log_decay} if recurrent else {"g": log_decay}
        function = gla.fused_recurrent_gla if recurrent else gla.chunk_gla
        return function(q, k, v, **gate, scale=scale, initial_state=state, output_final_state=True, cu_seqlens=bounds)

    return in_packed_rows(kernel, [q, k, v, log_decay.float()], state, documents)
