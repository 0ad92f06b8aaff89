"""The gated delta rule by the kernels of flash-linear-attention (version 0.6 or later), on a CUDA device."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from trivium.ops.recurrence import import_fla, in_packed_rows, wants_exact_float32

ROUNDING = "SOLVE_TRIL_DOT_PRECISION"  # of the triangular solve: a constant of fla's, TF32 on every GPU that has it


@cache
def load_rule() -> ModuleType:
    """Import fla's rule; where products of float32 are to be exact, its triangular solve is made so too.

    Triton refuses a constant that changes once a kernel is compiled, so it is settled for all dtypes at the first use.
    """
    rule = import_fla("fla.ops.gated_delta_rule")
    solve = import_fla("fla.ops.gated_delta_rule.chunk_fwd")
    rounded = getattr(solve, ROUNDING, None)
    if rounded is not None and wants_exact_float32():
        setattr(solve, ROUNDING, type(rounded)("ieee"))
    return rule


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
    rule = load_rule()
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
