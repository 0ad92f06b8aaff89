"""An update of all parameters: gradients are clipped to a global norm, AdamW (arXiv 1711.05101) moves the weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw as pytorch_adamw

from trivium.ops import dispatch
from trivium.ops.native import support


class Parameters(NamedTuple):
    """Parameters with what belongs to each: gradient, first and second moment of its shape, the number of updates it
    has seen (float32 scalar) and its weight decay."""

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    firsts: Sequence[Tensor]
    seconds: Sequence[Tensor]
    steps: Sequence[Tensor]
    decays: Sequence[float]


def adamw(
    parameters: Parameters,
    *,
    rate: float,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
    limit: float = math.inf,
    backend: str = "auto",
) -> Tensor:
    """Update weights, moments and steps in place; return the norm of all gradients before clipping, a scalar.

    The gradients' values are undefined afterwards. The backends are "reference", "torch", which calls PyTorch's fused
    kernel, and "native". Raises UserError for a backend that is missing or cannot.
    """
    weights = parameters.weights
    function = dispatch.load("adamw", backend, weights[0].device.type, facts(weights))
    return function(parameters, rate, betas, epsilon, limit)


def facts(weights: Sequence[Tensor]) -> tuple[tuple[str, Any], ...]:
    """Return what a backend may refuse."""
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    return ("dtype", " and ".join(dtypes)), ("device", weights[0].device.type)


@torch.no_grad()
def _reference(parameters: Parameters, rate: float, betas: tuple[float, float], epsilon: float, limit: float) -> Tensor:
    norm = torch.stack([grad.square().sum() for grad in parameters.grads]).sum().sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1)
    for weight, grad, first, second, step, decay in zip(*parameters, strict=True):
        step += 1
        first.mul_(betas[0]).add_((1 - betas[0]) * (factor * grad))
        second.mul_(betas[1]).add_((1 - betas[1]) * (factor * grad).square())
        mean = first / (1 - betas[0] ** float(step))
        spread = second / (1 - betas[1] ** float(step))
        weight.mul_(1 - rate * decay).sub_(rate * mean / (spread.sqrt() + epsilon))
    return norm


@torch.no_grad()
def _pytorch(parameters: Parameters, rate: float, betas: tuple[float, float], epsilon: float, limit: float) -> Tensor:
    norm = get_total_norm(parameters.grads)
    for grad in parameters.grads:
        grad.mul_((limit / (norm + 1e-6)).clamp(max=1))
    for decay in sorted(set(parameters.decays)):
        chosen = [index for index, each in enumerate(parameters.decays) if each == decay]
        weights, grads, firsts, seconds, steps = (
            [tensors[index] for index in chosen]
            for tensors in (
                parameters.weights,
                parameters.grads,
                parameters.firsts,
                parameters.seconds,
                parameters.steps,
            )
        )
        pytorch_adamw(
            weights,
            grads,
            firsts,
            seconds,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=decay,
            eps=epsilon,
            maximize=False,
        )
    return norm


def _native() -> Callable[..., Tensor]:
    from trivium.ops.native.adamw import native

    return native


def _refuses(facts: Mapping[str, Any]) -> str | None:
    if facts.get("rates", "one") == "several":
        return "it knows one learning rate for all, and groups have their own"
    dtype = facts.get("dtype", "float32")
    return "weights are in float32 or float64, not " + dtype if "bfloat16" in dtype else support.refuses(facts)


dispatch.register("adamw", "reference", dispatch.Backend(lambda: _reference))
dispatch.register(
    "adamw", "torch", dispatch.Backend(lambda: _pytorch, suits=lambda device_type: "PyTorch's fused AdamW")
)
dispatch.register(
    "adamw", "native", dispatch.Backend(_native, missing=support.missing, suits=support.suits, refuses=_refuses)
)
