"""A linear map with what stands beside it in a block, for passes without gradients: the norm before it and the
activation behind it, or the residual stream that it adds to.

A step of generation is short: each kernel less is a launch and a trip through memory less. Shapes: (..., D) in,
(..., N) out, the weight (N, D) as in nn.Linear.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.ops import dispatch
from trivium.ops.gelu import gelu
from trivium.ops.simplicial import triton_support

__all__ = ["Activation", "is_fused", "linear_add", "norm_feedforward", "norm_linear", "refuses"]

Activation = Literal["none", "gelu", "gelu_new"]
WIDEST = 1024  # of which a program holds whole rows
# What one kernel of a whole feed-forward can: the widths and a divisor of the hidden width; rows from which on it pays.
FEEDFORWARD_WIDTHS, FEEDFORWARD_HIDDEN, FEEDFORWARD_LEAST = (16, 32, 64, 128, 256), 64, 4096


def norm_linear(
    x: Tensor,
    norm: nn.Module,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    *,
    backend: str = "auto",
) -> Tensor:
    """Return activation(norm(x) weight^T + bias); `norm` is an nn.LayerNorm or nn.RMSNorm over the last dimension.

    The backend "triton" has no gradient and serves float16 and bfloat16; of many rows its kernel writes the norm, and
    the product is PyTorch's. Raises UserError for a backend that is missing or cannot.
    """
    facts = _facts(x, weight, ("norm", type(norm).__name__), ("wide", "yes" if x.shape[-1] > WIDEST else "no"))
    return dispatch.load("norm_linear", backend, x.device.type, facts)(x, norm, weight, bias, activation)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor, *, backend: str = "auto") -> Tensor:
    """Return stream + x weight^T + bias, a new tensor (..., N); backends as those of `norm_linear`."""
    return dispatch.load("linear_add", backend, x.device.type, _facts(x, weight))(x, weight, bias, stream)


def norm_feedforward(
    x: Tensor,
    norm: nn.Module,
    into: Tensor,
    into_bias: Tensor | None,
    back: Tensor,
    back_bias: Tensor | None,
    activation: Activation,
    *,
    backend: str = "auto",
    parts: tuple[str, str] = ("auto", "auto"),
) -> Tensor:
    """Return x + activation(norm(x) into^T + into_bias) back^T + back_bias; into is (F, D), back (D, F).

    Both biases are given or none. Backend "triton", which "auto" takes for many rows, writes the norm and calls the
    products of PyTorch, or is one kernel where those have not the activation; "torch" calls `norm_linear` and
    `linear_add`, whose backends are `parts`. Raises UserError for one that is missing or cannot.
    """
    width, hidden = into.shape[1], into.shape[0]
    fits = (
        width in FEEDFORWARD_WIDTHS and hidden % FEEDFORWARD_HIDDEN == 0 and (into_bias is None) == (back_bias is None)
    )
    more = (
        ("norm", type(norm).__name__),
        ("fits", "yes" if fits else "no"),
        ("rows", "many" if x.numel() > FEEDFORWARD_LEAST * x.shape[-1] else "few"),
        ("parts", "auto" if parts == ("auto", "auto") else "named"),
    )
    function = dispatch.load("norm_feedforward", backend, x.device.type, _facts(x, into, *more))
    if function is _norm_feedforward:
        return function(x, norm, into, into_bias, back, back_bias, activation, parts)
    return function(x, norm, into, into_bias, back, back_bias, activation)


def is_fused(x: Tensor) -> bool:
    """Say whether a block is to use these operators: on a GPU, where each kernel has its price, without gradients."""
    return x.device.type == "cuda" and not torch.is_grad_enabled()


def activate(y: Tensor, activation: Activation) -> Tensor:
    """Return the activation of y by the operators that training uses."""
    if activation == "gelu_new":
        return gelu(y)
    return functional.gelu(y) if activation == "gelu" else y


def _facts(x: Tensor, weight: Tensor, *more: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    same = "yes" if x.dtype == weight.dtype else "no"
    return (("dtype", x.dtype), ("one dtype", same), ("gradient", torch.is_grad_enabled()), *more)


def _norm_linear(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    return activate(functional.linear(norm(x), weight, bias), activation)


def _linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    return stream + functional.linear(x, weight, bias)


def _norm_feedforward(
    x: Tensor,
    norm: nn.Module,
    into: Tensor,
    into_bias: Tensor | None,
    back: Tensor,
    back_bias: Tensor | None,
    activation: Activation,
    parts: tuple[str, str] = ("auto", "auto"),
) -> Tensor:
    hidden = norm_linear(x, norm, into, into_bias, activation, backend=parts[0])
    return linear_add(hidden, back, back_bias, x, backend=parts[1])


def _norm_linear_reference(x: Tensor, norm: Any, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(wide)
    if isinstance(norm, nn.LayerNorm):
        h = h - h.mean(-1, keepdim=True)
    h = h * (h.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.to(wide)
    if isinstance(norm, nn.LayerNorm):
        h = h + norm.bias.to(wide)
    y = h @ weight.to(wide).T + (0 if bias is None else bias.to(wide))
    if activation == "gelu_new":
        y = gelu(y, backend="reference")
    elif activation == "gelu":
        y = y * (1 + torch.erf(y * 0.5**0.5)) / 2
    return y.to(x.dtype)


def _linear_add_reference(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).T + (0 if bias is None else bias.to(wide))
    return (stream.to(wide) + y).to(stream.dtype)


def _norm_feedforward_reference(
    x: Tensor,
    norm: Any,
    into: Tensor,
    into_bias: Tensor | None,
    back: Tensor,
    back_bias: Tensor | None,
    activation: Activation,
) -> Tensor:
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    hidden = _norm_linear_reference(wide, norm, into, into_bias, activation)
    return _linear_add_reference(hidden, back, back_bias, x)


def refuses(facts: Mapping[str, Any]) -> str | None:
    """Say why a kernel of 16 bits without gradients cannot serve a call with these facts, or return None."""
    if facts.get("gradient"):
        return "it has no gradient, and gradients are on"
    if facts.get("dtype", torch.bfloat16) not in (torch.bfloat16, torch.float16):
        return f"dtype {facts['dtype']}; allowed: bfloat16, float16"
    if facts.get("one dtype", "yes") == "no":
        return "weights or a cache of another dtype"
    if facts.get("norm", "LayerNorm") not in ("LayerNorm", "RMSNorm"):
        return f"norm {facts['norm']}"
    if facts.get("wide", "no") == "yes":
        return f"rows wider than {WIDEST}"
    return None


def _refuses_feedforward(facts: Mapping[str, Any]) -> str | None:
    named = refuses(facts)
    if named is not None:
        return named
    if facts.get("fits", "yes") == "no":
        return f"its widths are {FEEDFORWARD_WIDTHS}, with a hidden width in steps of {FEEDFORWARD_HIDDEN}"
    return "norm_linear or linear_add is asked for by name" if facts.get("parts", "auto") == "named" else None


def _slower_feedforward(facts: Mapping[str, Any]) -> str | None:
    return f"not more than {FEEDFORWARD_LEAST} rows" if facts.get("rows", "many") == "few" else None


def _load_norm_feedforward() -> Callable[..., Tensor]:
    from trivium.ops.fused_linear.launch import norm_feedforward

    return norm_feedforward


def _load_norm_linear() -> Callable[..., Tensor]:
    from trivium.ops.fused_linear.launch import norm_linear

    return norm_linear


def _load_linear_add() -> Callable[..., Tensor]:
    from trivium.ops.fused_linear.launch import linear_add

    return linear_add


def _never_slower(facts: Mapping[str, Any]) -> None:
    return None


for _name, _reference, _torch, _load, _no, _slower in (
    ("norm_linear", _norm_linear_reference, _norm_linear, _load_norm_linear, refuses, _never_slower),
    ("linear_add", _linear_add_reference, _linear_add, _load_linear_add, refuses, _never_slower),
    (
        "norm_feedforward",
        _norm_feedforward_reference,
        _norm_feedforward,
        _load_norm_feedforward,
        _refuses_feedforward,
        _slower_feedforward,
    ),
):
    dispatch.register(_name, "reference", dispatch.Backend(lambda function=_reference: function))
    dispatch.register(
        _name,
        "torch",
        dispatch.Backend(lambda function=_torch: function, suits=lambda device_type: "PyTorch's own, one by one"),
    )
    dispatch.register(
        _name,
        "triton",
        dispatch.Backend(
            _load, missing=triton_support.missing, suits=triton_support.suits, refuses=_no, slower=_slower
        ),
    )
