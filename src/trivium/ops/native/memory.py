"""A step of generation in a mixer with a memory by the kernel in C: what reads and writes each memory once a pass."""

import torch
from torch import Tensor

from trivium.ops.native.kernels import call


def native(
    q_BHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, beta_BNH: Tensor | None, decay: Tensor | None, state_BHKV: Tensor
) -> Tensor:
    """Return q S (B, H, V) after S, in place, has been decayed and written to; all in the state's dtype.

    The decay's factors are (B, H) or (B, H, K), or None for none. Without strengths beta values are added as they are,
    with them less what the memory answers. Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    rows, heads, width, value_width = state_BHKV.shape
    corrections = k_BNHK.shape[1]
    shapes = {
        "q": (q_BHK, (rows, heads, width)),
        "k": (k_BNHK, (rows, corrections, heads, width)),
        "v": (v_BNHV, (rows, corrections, heads, value_width)),
        "beta": (beta_BNH, (rows, corrections, heads)),
        "decay": (decay, (rows, heads, width)[: 2 if decay is None else decay.ndim]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != state_BHKV.dtype):
            raise ValueError(f"{name}: {tensor.dtype} of {tuple(tensor.shape)}; expected {state_BHKV.dtype} of {shape}")
    if not state_BHKV.is_contiguous() or state_BHKV.device.type != "cpu":
        raise ValueError("the state: backend native needs a contiguous one on a CPU")
    given = [None if tensor is None else tensor.contiguous() for tensor, _ in shapes.values()]
    out_BHV = state_BHKV.new_empty(rows, heads, value_width)
    call(
        "memory_step",
        state_BHKV.dtype,
        *(None if tensor is None else tensor.data_ptr() for tensor in given),
        state_BHKV.data_ptr(),
        out_BHV.data_ptr(),
        *(rows, corrections, heads, width, value_width),
        int(decay is not None and decay.ndim == 3),
        torch.get_num_threads(),
    )
    return out_BHV


def convolution(x_BC: Tensor, recent_BRC: Tensor, weight_RC: Tensor) -> Tensor:
    """Return SiLU of the convolution (B, C) and move the inputs in place; all of one dtype."""
    (rows, past, channels), dtype = recent_BRC.shape, recent_BRC.dtype
    for name, tensor, shape in (("x", x_BC, (rows, channels)), ("weight", weight_RC, (past + 1, channels))):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name}: {tensor.dtype} of {tuple(tensor.shape)}; expected {dtype} of {shape}")
    if not recent_BRC.is_contiguous() or recent_BRC.device.type != "cpu":
        raise ValueError("the last inputs: backend native needs contiguous ones on a CPU")
    x_BC, weight_RC = x_BC.contiguous(), weight_RC.contiguous()
    out_BC = torch.empty_like(x_BC)
    tensors = (x_BC, recent_BRC, weight_RC, out_BC)
    call(
        "convolution_step",
        dtype,
        *(each.data_ptr() for each in tensors),
        *(rows, past, channels),
        torch.get_num_threads(),
    )
    return out_BC
