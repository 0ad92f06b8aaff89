"""The gated delta rule by the kernels of flash-linear-attention (version 0.6 or later), on a CUDA device."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trivium.ops.recurrence import import_fla, in_packed_rows, restarts, wants_exact_float32

RECURRENT = 16  # so many tokens, without gradients, are not worth a chunk: the recurrent kernel reads them one by one
ANCHORED = 32
"""Up to so many tokens of 16 bits what fla gives for `log_decay` is put right; the rounding of a longer chunk's other
sums outweighs the one that is mended."""

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
    recurrent = q.shape[1] <= RECURRENT and not torch.is_grad_enabled()
    if q.shape[1] <= ANCHORED and torch.is_grad_enabled() and q.dtype != torch.float32:
        log_decay, state = AnchoredDecay.apply(log_decay.float(), state, documents)

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


class AnchoredDecay(torch.autograd.Function):
    """Return (log_decay, state) as they are; their gradients make that of log_decay right at the first token.

    fla sums <S, dS>, the K x V products of a chunk's first state S with its gradient, in the dtype of q: 1 % off in
    bfloat16 at a few tokens, by the same number at all tokens of the chunk. The first decay is met nowhere but as a
    factor of S, so its own gradient is <S, dS>, here summed in float32: what fla is off by there, it is off by
    everywhere. Only a row's first document begins from a state; the others, from zero, are left alone.
    """

    @staticmethod
    def forward(
        ctx: Any, log_decay_BTH: Tensor, state_BHKV: Tensor, documents_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(state_BHKV, documents_BT)
        return log_decay_BTH.view_as(log_decay_BTH), state_BHKV.view_as(state_BHKV)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        decays_BTH, states_BHKV = gradients
        state_BHKV, documents_BT = ctx.saved_tensors
        off_BH = decays_BTH[:, 0] - (state_BHKV * states_BHKV).sum((-2, -1))
        if documents_BT is None:
            return decays_BTH - off_BH[:, None], states_BHKV, None
        first_BT = restarts(documents_BT).cumsum(1) == 0
        return decays_BTH - off_BH[:, None] * first_BT[..., None], states_BHKV, None
