"""A linear map of many rows, y = x weight^T + bias, with all of its gradients. Shapes: (..., K) in, N outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.ops import dispatch
from trivium.ops.native import support

LEAST = 64  # rows from which on a kernel that copies the weight first is worth it


class Linear(nn.Linear):
    """PyTorch's, under its names, whose product is the operator's; `backend` is that of operator linear."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, backend: str = "auto"):
        super().__init__(inputs, outputs, bias=bias)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, backend=self.backend)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Return y (..., N) of x (..., K), weight (N, K) and bias (N,); under autocast in its dtype.

    The backends are "torch", "reference" and "native". With "auto" fewer than LEAST rows, and what torch.compile
    traces, are PyTorch's. Raises UserError for a backend that is missing or cannot.
    """
    if backend == "auto" and is_left_to_pytorch(x):
        return functional.linear(x, weight, bias)
    return dispatch.load("linear", backend, x.device.type, facts(x, weight))(x, weight, bias)


def is_left_to_pytorch(x: Tensor) -> bool:
    """Say whether "auto" takes PyTorch's for this input whatever else there is."""
    return torch.compiler.is_compiling() or x.numel() < LEAST * x.shape[-1]


def facts(x: Tensor, weight: Tensor) -> tuple[tuple[str, Any], ...]:
    """Return what a backend may refuse."""
    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    alike = (cast or weight.dtype == x.dtype) and weight.device == x.device
    return ("dtype", dtype), ("device", device), ("alike", "yes" if alike else "no")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the formula."""
    y = torch.einsum("...k,nk->...n", x, weight)
    return y if bias is None else y + bias.to(y.dtype)


def refuses(facts: Mapping[str, Any]) -> str | None:
    """Return why the kernels in C cannot serve such a call, or None."""
    if str(facts.get("dtype")) == "torch.bfloat16":
        return "bfloat16 products are PyTorch's, which knows the processor's instructions for them"
    if facts.get("alike") == "no":
        return "x and the weight differ in dtype or device"
    return support.refuses(facts)


def _native() -> Callable[..., Tensor]:
    from trivium.ops.native.linear import native

    return native


dispatch.register("linear", "reference", dispatch.Backend(lambda: reference))
dispatch.register(
    "linear", "torch", dispatch.Backend(lambda: functional.linear, suits=lambda device_type: "PyTorch's own")
)
dispatch.register(
    "linear",
    "native",
    dispatch.Backend(_native, missing=support.missing, suits=support.suits, refuses=refuses),
)
