"""One token of gated linear attention, in place: what a step of generation does in each layer."""

import torch
from torch import Tensor

from trivium.ops.memory_step import memory_step_


def gated_linear_attention_step_(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BHK: Tensor, state_BHKV: Tensor, *, scale: float
) -> Tensor:
    """Return o (B, H, V) and change `state_BHKV` to the state after the token; for no_grad.

    The recurrence is that of `gated_linear_attention`, in the state's precision.
    """
    with torch.autocast(q_BHK.device.type, enabled=False):
        q, k, v, log_decay = (x.to(state_BHKV.dtype) for x in (q_BHK, k_BHK, v_BHV, log_decay_BHK))
        return memory_step_(scale * q, k[:, None], v[:, None], None, log_decay.exp(), state_BHKV).to(q_BHK.dtype)
