"""Linear maps by the kernels in C. Shapes: M rows, K inputs, N outputs."""

from typing import Any

import torch
from torch import Tensor

from trivium.ops.native.kernels import call


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        y_MN = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
        call(
            "linear_forward",
            x_MK.dtype,
            x_MK.data_ptr(),
            weight_NK.data_ptr(),
            _address(bias_N),
            y_MN.data_ptr(),
            *x_MK.shape,
            weight_NK.shape[0],
            torch.get_num_threads(),
        )
        return y_MN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_MN = grads[0].contiguous()
        x_MK, weight_NK = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        if torch.is_grad_enabled() or (wants_bias and not wants_weight):  # the first: for gradients of these
            return (
                grad_MN @ weight_NK if wants_x else None,
                grad_MN.T @ x_MK if wants_weight else None,
                grad_MN.sum(0) if wants_bias else None,
            )
        grad_x = torch.empty_like(x_MK) if wants_x else None
        grad_weight = torch.empty_like(weight_NK) if wants_weight else None
        grad_bias = grad_MN.new_empty(weight_NK.shape[0]) if wants_bias else None
        tensors = (grad_MN, x_MK, weight_NK, grad_x, grad_weight, grad_bias)
        sizes = (*x_MK.shape, weight_NK.shape[0], torch.get_num_threads())
        call("linear_backward", x_MK.dtype, *map(_address, tensors), *sizes)
        return grad_x, grad_weight, grad_bias


def native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias; raise ValueError for shapes that do not fit or a bias of another dtype."""
    fits = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
    if x.shape[-1:] != weight.shape[1:] or not fits:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias) if tensor is not None)
        raise ValueError(f"linear: {shapes}: needed are (..., K), (N, K) and (N,) in one dtype")
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    y_MN = _Linear.apply(x_MK, weight.contiguous(), None if bias is None else bias.contiguous())
    return y_MN.view(*x.shape[:-1], weight.shape[0])
