"""One token of the gated delta rule, in place: what a step of generation does in each layer."""

import torch
from torch import Tensor


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
        if log_decay_BH is not None:
            state_BHKV.mul_(log_decay_BH.to(wide).exp()[..., None, None])
        for n in range(k.shape[1]):
            known_BHV = (k[:, n, :, None] @ state_BHKV)[..., 0, :]
            news_BHV = beta[:, n, :, None] * (v[:, n] - known_BHV)
            state_BHKV.addcmul_(k[:, n, ..., None], news_BHV[..., None, :])
        return ((scale * q)[..., None, :] @ state_BHKV)[..., 0, :].to(q_BHK.dtype)
