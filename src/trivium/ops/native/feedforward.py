"""The feed-forward of a block by the kernels in C. Shapes: M rows, K width, F hidden width."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from trivium.ops.native.kernels import call

_Pointer, _Integer = ctypes.c_void_p, ctypes.c_int64


class _Call(ctypes.Structure):
    """`FeedForward` of linear.h."""

    _fields_ = (
        *((name, _Pointer) for name in ("x", "input", "input_bias", "output", "output_bias", "stream")),
        *((name, _Integer) for name in ("rows", "width", "hidden_width", "threads")),
    )


def _run(name: str, given: tuple[Tensor, ...], stream: Tensor | None, others: tuple[Tensor, ...]) -> None:
    described = _Call(
        *(tensor.data_ptr() for tensor in given),
        None if stream is None else stream.data_ptr(),
        *given[0].shape,
        given[1].shape[0],
        torch.get_num_threads(),
    )
    call(name, given[0].dtype, ctypes.addressof(described), *(tensor.data_ptr() for tensor in others))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream_MK: Tensor | None, *given: Tensor) -> Tensor:
        x_MK, input_FK = given[:2]
        hidden_MF, y_MK = x_MK.new_empty(x_MK.shape[0], input_FK.shape[0]), torch.empty_like(x_MK)
        _run("feedforward_forward", given, stream_MK, (hidden_MF, y_MK))
        ctx.save_for_backward(*given, hidden_MF)
        return y_MK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *given, hidden_MF = ctx.saved_tensors
        found = tuple(torch.empty_like(tensor) for tensor in given)
        grad_MK = grads[0].contiguous()
        _run("feedforward_backward", tuple(given), None, (hidden_MF, grad_MK, *found))
        return grad_MK if ctx.needs_input_grad[0] else None, *found


def native(x: Tensor, *weights: Tensor, stream: Tensor | None = None) -> Tensor:
    """Return stream + gelu(x input^T + input_bias) output^T + output_bias; raise ValueError for what does not fit."""
    width, wide = x.shape[-1], weights[0].shape[0]
    shapes = [tuple(weight.shape) for weight in weights]
    if shapes != [(wide, width), (wide,), (width, wide), (width,)] or {weight.dtype for weight in weights} != {x.dtype}:
        raise ValueError(f"feedforward: {tuple(x.shape)}, {shapes}: needed are (F, K), (F,), (K, F), (K,) in one dtype")
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    stream_MK = None if stream is None else stream.to(x.dtype).reshape(x_MK.shape).contiguous()
    return _FeedForward.apply(stream_MK, x_MK, *(weight.contiguous() for weight in weights)).view(x.shape)
