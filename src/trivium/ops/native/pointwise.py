"""GELU in its tanh form by the kernels in C, as an operator that autograd and torch.compile know."""

import torch
from torch import Tensor

from trivium.ops.native.kernels import call, once

_library = torch.library.Library("trivium", "FRAGMENT")
_library.define("native_gelu(Tensor x) -> Tensor")
_library.define("native_gelu_backward(Tensor x, Tensor grad) -> Tensor")


def _run(name: str, *given: Tensor) -> Tensor:
    result = torch.empty_like(given[0])
    places = (tensor.data_ptr() for tensor in (*given, result))
    call(name, result.dtype, *places, result.numel(), torch.get_num_threads())
    return result


_library.impl("native_gelu", lambda x: _run("gelu_forward", x), "CPU")
_library.impl("native_gelu_backward", lambda x, grad: _run("gelu_backward", x, grad), "CPU")
torch.library.register_fake("trivium::native_gelu")(lambda x: torch.empty_like(x))
torch.library.register_fake("trivium::native_gelu_backward")(lambda x, grad: torch.empty_like(x))


torch.library.register_autograd(
    "trivium::native_gelu",
    lambda ctx, grad: torch.ops.trivium.native_gelu_backward(*ctx.saved_tensors, grad.contiguous()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_library,
)
once("trivium::native_gelu_backward", _library)


def native(x: Tensor) -> Tensor:
    """Return gelu(x) of any shape."""
    return torch.ops.trivium.native_gelu(x.contiguous())
