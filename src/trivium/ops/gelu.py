"""GELU in GPT-2's tanh form, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (arXiv 1606.08415), of any shape."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trivium.ops import dispatch
from trivium.ops.native.support import missing, refuses, suits


def gelu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Return gelu(x); raise UserError for a backend that is missing."""
    return dispatch.load("gelu", backend, x.device.type, (("dtype", x.dtype),))(x)


def reference(x: Tensor) -> Tensor:
    """Return the formula, in float32, or float64 for float64 inputs."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))).to(x.dtype)


def _native() -> Callable[[Tensor], Tensor]:
    from trivium.ops.native.pointwise import native

    return native


dispatch.register("gelu", "reference", dispatch.Backend(lambda: reference))
dispatch.register(
    "gelu",
    "torch",
    dispatch.Backend(
        lambda: lambda x: functional.gelu(x, approximate="tanh"), suits=lambda device_type: "PyTorch's own"
    ),
)
dispatch.register("gelu", "native", dispatch.Backend(_native, missing=missing, suits=suits, refuses=refuses))
