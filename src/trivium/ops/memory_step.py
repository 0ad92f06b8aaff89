"""One token of a mixer with a memory, in place: the short convolution before it; decay, write, read.

Shapes: B rows, N corrections, H heads, K key width, V value width; C channels, R remembered inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.native import support


def memory_step_(
    q_BHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    beta_BNH: Tensor | None,
    decay: Tensor | None,
    state_BHKV: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return o = q S (B, H, V) and change the state to S, for no_grad; every tensor is of the state's dtype.

    First the state is multiplied by the factors `decay` (B, H) or (B, H, K), or by none. Then N keys are written, one
    after the other: S + k v^T, or with strengths beta S + beta k (v - k S)^T. The backends are "reference", "torch" and
    "native". Raises UserError for a backend that is missing or cannot.
    """
    if backend == "auto" and torch.compiler.is_compiling():
        return _pytorch(q_BHK, k_BNHK, v_BNHV, beta_BNH, decay, state_BHKV)
    whole = "yes" if state_BHKV.is_contiguous() else "no"
    facts = (("dtype", state_BHKV.dtype), ("device", state_BHKV.device.type), ("contiguous", whole))
    function = dispatch.load("memory_step", backend, state_BHKV.device.type, facts)
    return function(q_BHK, k_BNHK, v_BNHV, beta_BNH, decay, state_BHKV)


def convolution_step_(x_BC: Tensor, recent_BRC: Tensor, weight_RC: Tensor, *, backend: str = "auto") -> Tensor:
    """Return SiLU of the causal convolution at a new input, (B, C), which takes the place of the oldest; for no_grad.

    `weight_RC` (R + 1, C) is that of the R inputs before and of the new one. Backends and errors as of `memory_step_`.
    """
    if backend == "auto" and torch.compiler.is_compiling():
        return _convolution(x_BC, recent_BRC, weight_RC)
    whole = "yes" if recent_BRC.is_contiguous() else "no"
    facts = (("dtype", recent_BRC.dtype), ("device", recent_BRC.device.type), ("contiguous", whole))
    function = dispatch.load("convolution_step", backend, recent_BRC.device.type, facts)
    return function(x_BC, recent_BRC, weight_RC)


def _convolution_reference(x_BC: Tensor, recent_BRC: Tensor, weight_RC: Tensor) -> Tensor:
    sum_BC = torch.einsum("brc,rc->bc", torch.cat((recent_BRC, x_BC[:, None]), dim=1), weight_RC)
    recent_BRC.copy_(torch.cat((recent_BRC[:, 1:], x_BC[:, None]), dim=1))
    return sum_BC * sum_BC.sigmoid()


def _convolution(x_BC: Tensor, recent_BRC: Tensor, weight_RC: Tensor) -> Tensor:
    seen_BSC = torch.cat((recent_BRC, x_BC[:, None]), dim=1)
    recent_BRC.copy_(seen_BSC[:, 1:])
    return torch.nn.functional.silu((seen_BSC * weight_RC).sum(1))


def reference(
    q_BHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, beta_BNH: Tensor | None, decay: Tensor | None, state_BHKV: Tensor
) -> Tensor:
    """Return o as the formula says."""
    if decay is not None:
        state_BHKV.copy_(torch.einsum("bhk,bhkv->bhkv" if decay.ndim == 3 else "bh,bhkv->bhkv", decay, state_BHKV))
    for n in range(k_BNHK.shape[1]):
        news_BHV = v_BNHV[:, n]
        if beta_BNH is not None:
            known_BHV = torch.einsum("bhk,bhkv->bhv", k_BNHK[:, n], state_BHKV)
            news_BHV = torch.einsum("bh,bhv->bhv", beta_BNH[:, n], news_BHV - known_BHV)
        state_BHKV.add_(torch.einsum("bhk,bhv->bhkv", k_BNHK[:, n], news_BHV))
    return torch.einsum("bhk,bhkv->bhv", q_BHK, state_BHKV)


def _pytorch(
    q_BHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, beta_BNH: Tensor | None, decay: Tensor | None, state_BHKV: Tensor
) -> Tensor:
    """Each operation passes over the state once, so that a step costs what reading and writing it costs."""
    if decay is not None:
        state_BHKV.mul_(decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    for n in range(k_BNHK.shape[1]):
        news_BHV = v_BNHV[:, n]
        if beta_BNH is not None:
            known_BHV = (k_BNHK[:, n, :, None] @ state_BHKV)[..., 0, :]
            news_BHV = beta_BNH[:, n, :, None] * (news_BHV - known_BHV)
        state_BHKV.addcmul_(k_BNHK[:, n, ..., None], news_BHV[..., None, :])
    return (q_BHK[..., None, :] @ state_BHKV)[..., 0, :]


def _refuses(facts: Mapping[str, Any]) -> str | None:
    if str(facts.get("dtype")) == "torch.bfloat16":
        return "it computes in float32 or float64"
    if facts.get("contiguous") == "no":
        return "the state is not contiguous"
    return support.refuses(facts)


def _native() -> Callable[..., Tensor]:
    from trivium.ops.native.memory import native

    return native


dispatch.register("memory_step", "reference", dispatch.Backend(lambda: reference))
dispatch.register("memory_step", "torch", dispatch.Backend(lambda: _pytorch, suits=lambda device_type: "PyTorch's own"))
dispatch.register(
    "memory_step", "native", dispatch.Backend(_native, missing=support.missing, suits=support.suits, refuses=_refuses)
)


def _native_convolution() -> Callable[..., Tensor]:
    from trivium.ops.native.memory import convolution

    return convolution


dispatch.register("convolution_step", "reference", dispatch.Backend(lambda: _convolution_reference))
dispatch.register(
    "convolution_step", "torch", dispatch.Backend(lambda: _convolution, suits=lambda device_type: "PyTorch's own")
)
dispatch.register(
    "convolution_step",
    "native",
    dispatch.Backend(_native_convolution, missing=support.missing, suits=support.suits, refuses=_refuses),
)
