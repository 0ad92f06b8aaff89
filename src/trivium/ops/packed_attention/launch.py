"""Launch the kernels of short causal attention, as operators that torch.compile and autograd know."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trivium.ops.packed_attention import kernels, tile
from trivium.ops.simplicial.triton_support import interpreted


class _Kernels(NamedTuple):
    """The kernels, whose launch syntax no type checker follows."""

    forward: Any = kernels.forward_kernel
    prompt: Any = kernels.prompt_kernel
    backward: Any = kernels.backward_kernel


_kernels = _Kernels()


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], x: Tensor, kv_heads: int, window: int, *sizes: int, **flags: bool
) -> None:
    batch, tokens, packed, width = x.shape
    kernel[(batch * kv_heads,)](
        *tensors,
        tokens,
        *sizes,
        window,
        width**-0.5,
        HEADS=packed - 2 * kv_heads,
        KV=kv_heads,
        D=width,
        BT=tile(tokens),
        BD=tile(width),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile(tokens) // 16,
        **flags,
    )


def _forward(x: Tensor, kv_heads: int, window: int) -> Tensor:
    """Return o (B, T, H, D) of x (B, T, H + 2 G, D), contiguous, whose G key heads stand behind the queries'."""
    o = torch.empty(*x.shape[:2], x.shape[2] - 2 * kv_heads, x.shape[3], dtype=x.dtype, device=x.device)
    _launch(_kernels.forward, (x, o), x, kv_heads, window)
    return o


def _prompt(x: Tensor, keys: Tensor, values: Tensor, length: Tensor, added: Tensor | None, window: int) -> Tensor:
    """Return o (B, T, H, D) of x, and write its keys and values into the first slots of the caches (B, S, G, D), and
    the number of tokens that are a row's own into `length`.
    """
    slots, kv_heads = keys.shape[1:3]
    o = torch.empty(*x.shape[:2], x.shape[2] - 2 * kv_heads, x.shape[3], dtype=x.dtype, device=x.device)
    if o.numel():
        kept = keys, values, length, length if added is None else added
        _launch(_kernels.prompt, (x, o, *kept), x, kv_heads, window, slots, MASKED=added is not None)
    return o


def _backward(do: Tensor, x: Tensor, kv_heads: int, window: int) -> Tensor:
    """Return the gradient of x."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_kernels.backward, (do.contiguous(), x, dx), x, kv_heads, window)
    return dx


_forward_operator = torch.library.custom_op("trivium::packed_attention_forward", _forward, mutates_args=())
prompt_operator = torch.library.custom_op(
    "trivium::packed_attention_prompt", _prompt, mutates_args=("keys", "values", "length")
)
_backward_operator = torch.library.custom_op("trivium::packed_attention_backward", _backward, mutates_args=())


@_forward_operator.register_fake
def _(x: Tensor, kv_heads: int, window: int) -> Tensor:
    return torch.empty(*x.shape[:2], x.shape[2] - 2 * kv_heads, x.shape[3], dtype=x.dtype, device=x.device)


@prompt_operator.register_fake
def _(x: Tensor, keys: Tensor, values: Tensor, length: Tensor, added: Tensor | None, window: int) -> Tensor:
    return torch.empty(*x.shape[:2], x.shape[2] - 2 * keys.shape[2], x.shape[3], dtype=x.dtype, device=x.device)


@_backward_operator.register_fake
def _(do: Tensor, x: Tensor, kv_heads: int, window: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.rest = inputs[1:]


def _gradients(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_operator(do, *ctx.saved_tensors, *ctx.rest), None, None


_forward_operator.register_autograd(_gradients, setup_context=_setup_context)


def triton_packed(x_BTND: Tensor, kv_heads: int, window: int | None, attention_backend: str) -> Tensor:
    """Return o (B, T, H, D); arguments as in `packed_attention`."""
    if x_BTND.device.type == "cpu" and not interpreted():
        raise ValueError("x: on cpu; backend triton needs tensors on a GPU")
    tokens = x_BTND.shape[1]
    if not x_BTND.numel():
        return x_BTND[:, :, : x_BTND.shape[2] - 2 * kv_heads]
    return _forward_operator(x_BTND.contiguous(), kv_heads, tokens if window is None else min(window, tokens))
