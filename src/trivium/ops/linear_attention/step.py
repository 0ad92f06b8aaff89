"""One token of gated linear attention, in place: what a step of generation does in each layer."""

import torch
from torch import Tensor


def gated_linear_attention_step_(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BHK: Tensor, state_BHKV: Tensor, *, scale: float
) -> Tensor:
    """Return o (B, H, V) and change `state_BHKV` to the state after the token; for no_grad.

    The recurrence is that of `gated_linear_attention`, in the state's precision. Each of the three operations passes
    over the state once, so that a step costs what reading and writing it costs.
    """
    with torch.autocast(q_BHK.device.type, enabled=False):
        q, k, v, log_decay = (x.to(state_BHKV.dtype) for x in (q_BHK, k_BHK, v_BHV, log_decay_BHK))
        state_BHKV.mul_(log_decay.exp()[..., None])
        state_BHKV.addcmul_(k[..., None], v[..., None, :])
        return ((scale * q)[..., None, :] @ state_BHKV)[..., 0, :].to(q_BHK.dtype)
