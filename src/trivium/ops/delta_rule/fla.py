"""The gated delta rule by the kernels of flash-linear-attention (version 0.6 or later), on a CUDA device."""

import torch
from torch import Tensor

from trivium.ops.recurrence import import_fla, in_packed_rows


def by_fla(
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
    """Return (o, state); arguments as in the reference, float32 or less."""
    rule = import_fla("fla.ops.gated_delta_rule")
    # A few tokens are not worth a chunk; the recurrent kernel, which has no gradient, reads them one after the other.
    recurrent = q.shape[1] <= 16 and not torch.is_grad_enabled()

    def kernel(tensors: list[Tensor], state: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, beta, log_decay = tensors
        function = rule.fused_recurrent_gated_delta_rule if recurrent else rule.chunk_gated_delta_rule
        return function(
            q,
            k,
            v,
            g=log_decay,
            beta=beta,
            scale=scale,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=bounds,
        )

    return in_packed_rows(kernel, [q, k, v, beta.float(), log_decay.float()], state, documents)
