"""A residual sum and its layer norm by the kernels in C. Shapes: M rows, K width."""

from typing import Any

import torch
from torch import Tensor

from trivium.ops.native.kernels import call


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, y_MK: Tensor | None, weight_K: Tensor, bias_K: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        rows, width = x_MK.shape
        sum_MK = None if y_MK is None else torch.empty_like(x_MK)
        out_MK, moments_M2 = torch.empty_like(x_MK), x_MK.new_empty(rows, 2)
        call(
            "norm_forward",
            x_MK.dtype,
            *_addresses(x_MK, y_MK, weight_K, bias_K, sum_MK, out_MK, moments_M2),
            rows,
            width,
            epsilon,
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x_MK if sum_MK is None else sum_MK, moments_M2, weight_K)
        ctx.set_materialize_grads(False)
        # x itself passes through, so that what comes back along the stream is added in the kernel.
        return x_MK if sum_MK is None else sum_MK, out_MK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sum_MK, moments_M2, weight_K = ctx.saved_tensors
        grad_sum_MK, grad_MK = (None if grad is None else grad.contiguous() for grad in grads)
        wants_y = ctx.needs_input_grad[1]
        if grad_MK is None:
            return grad_sum_MK, grad_sum_MK if wants_y else None, None, None, None
        grad_x_MK = torch.empty_like(sum_MK)
        grad_weight_K, grad_bias_K = torch.empty_like(weight_K), torch.empty_like(weight_K)
        call(
            "norm_backward",
            sum_MK.dtype,
            *_addresses(grad_MK, grad_sum_MK, sum_MK, moments_M2, weight_K, grad_x_MK, grad_weight_K, grad_bias_K),
            *sum_MK.shape,
            torch.get_num_threads(),
        )
        return grad_x_MK, grad_x_MK if wants_y else None, grad_weight_K, grad_bias_K, None


def native(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x + y and its layer norm; x itself without y."""
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    y_MK = None if y is None else y.reshape(x_MK.shape).contiguous()
    sum_MK, out_MK = _Norm.apply(x_MK, y_MK, weight, bias, epsilon)
    return sum_MK.view(x.shape), out_MK.view(x.shape)
