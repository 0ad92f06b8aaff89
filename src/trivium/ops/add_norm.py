"""A residual sum and its layer norm (arXiv 1607.06450), as one operator. Shapes: (..., K)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trivium.ops import dispatch
from trivium.ops.linear import is_left_to_pytorch
from trivium.ops.native import support


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, *, epsilon: float = 1e-5, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return s = x + y, or x itself without y, and its layer norm with weight and bias (K,).

    The backends are "torch", "reference" and "native"; with "auto" what `linear` leaves to PyTorch is not for the
    last. Raises UserError for a backend that is missing or cannot, ValueError for shapes that do not fit.
    """
    if y is not None and y.shape != x.shape:
        raise ValueError(f"add_norm: x is {tuple(x.shape)} and y {tuple(y.shape)}; both need one shape")
    if not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            f"add_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}: one width"
        )
    if backend == "auto" and is_left_to_pytorch(x):
        return _pytorch(x, y, weight, bias, epsilon)
    if backend == "auto" and y is not None and x.device.type == "cpu":
        y = y.to(torch.promote_types(x.dtype, y.dtype))  # what autocast made narrow; the sum is as wide as x
    others = (weight, bias) if y is None else (weight, bias, y)
    alike = all(other.dtype == x.dtype and other.device == x.device for other in others)
    facts = (("dtype", x.dtype), ("device", x.device.type), ("alike", "yes" if alike else "no"))
    return dispatch.load("add_norm", backend, x.device.type, facts)(x, y, weight, bias, epsilon)


def reference(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the formula."""
    total = x if y is None else x + y
    away = total - total.mean(-1, keepdim=True)
    return total, away / (away.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias


def _pytorch(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    total = x if y is None else x + y
    return total, functional.layer_norm(total, weight.shape, weight, bias, epsilon)


def _refuses(facts: Mapping[str, Any]) -> str | None:
    if facts.get("alike") == "no" or str(facts.get("dtype")) == "torch.bfloat16":
        return "it computes where all is in float32 or all in float64"
    return support.refuses(facts)


def _native() -> Callable[..., tuple[Tensor, Tensor]]:
    from trivium.ops.native.norm import native

    return native


dispatch.register("add_norm", "reference", dispatch.Backend(lambda: reference))
dispatch.register("add_norm", "torch", dispatch.Backend(lambda: _pytorch, suits=lambda device_type: "PyTorch's own"))
dispatch.register(
    "add_norm", "native", dispatch.Backend(_native, missing=support.missing, suits=support.suits, refuses=_refuses)
)
