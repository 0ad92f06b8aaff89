"""One token of the gated delta rule, in place: what a step of generation does in each layer."""

import torch
from torch import Tensor

from trivium.ops.memory_step import memory_step_


def gated_delta_rule_step_(
    q_BHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    beta_BNH: Tensor,
    log_decay_BH: Tensor | None,
    state_BHKV: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return o (B, H, V) and change `state_BHKV` to the state after the token; for no_grad.

    The token decays the state once (not if `log_decay_BH` is None), corrects it N times, and is answered by the last.
    The recurrence is that of `gated_delta_rule`, in the state's precision.
    """
    wide = state_BHKV.dtype
    with torch.autocast(q_BHK.device.type, enabled=False):
        q, k, v, beta = (x.to(wide) for x in (q_BHK, k_BNHK, v_BNHV, beta_BNH))
        decay_BH = None if log_decay_BH is None else log_decay_BH.to(wide).exp()
        return memory_step_(scale * q, k, v, beta, decay_BH, state_BHKV).to(q_BHK.dtype)
