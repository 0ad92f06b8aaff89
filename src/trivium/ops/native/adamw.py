"""Gradient clipping and AdamW by the kernel in C."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trivium.ops.native.kernels import call


def native(
    parameters: tuple[Sequence[Any], ...], rate: float, betas: tuple[float, float], epsilon: float, limit: float
) -> Tensor:
    """Update in place and return the norm; arguments as in `adamw`."""
    weights, grads, firsts, seconds, steps, decays = parameters
    written = (weights, firsts, seconds)
    if not all(tensor.is_contiguous() for tensors in written for tensor in tensors):
        raise ValueError("adamw: the elements of a weight and of its moments must follow one another")
    grads = [grad.contiguous() for grad in grads]
    norm = torch.empty((), dtype=weights[0].dtype)
    tables = [
        (ctypes.c_void_p * len(weights))(*(tensor.data_ptr() for tensor in tensors))
        for tensors in (weights, grads, firsts, seconds, steps)
    ]
    call(
        "adamw",
        norm.dtype,
        *tables,
        (ctypes.c_int64 * len(weights))(*(tensor.numel() for tensor in weights)),
        (ctypes.c_double * len(weights))(*decays),
        len(weights),
        rate,
        *betas,
        epsilon,
        limit,
        norm.data_ptr(),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version((*weights, *firsts, *seconds, *steps))
    return norm
