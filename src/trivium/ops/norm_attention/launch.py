"""Launch what a step and a prompt take: one kernel where rows are few, else the product and a kernel of attention."""

from typing import Any

import torch
from torch import Tensor, nn

from trivium.ops.cached_attention.triton_split import LOG2E
from trivium.ops.cached_attention.triton_step import by_triton as step_by_triton
from trivium.ops.fused_linear.launch import norm_linear
from trivium.ops.norm_attention import kernels
from trivium.ops.packed_attention.launch import prompt_operator
from trivium.ops.simplicial.triton_support import interpreted

# Rows and slots up to which a step is one kernel. In a model of 8 heads of 32 and 15 slots, on an H200: 1,000 rows take
# 12.3 us in place of 15.5 for the product and a kernel of attention; 10,000 rows 95 in place of 83.
STEP_IN_ONE, STEP_SLOTS = 4096, 16
ROWS, TILE = 16, 8192  # rows of such a program, and numbers of keys that it holds at once; 64 rows take 18.5 us

_kernel: Any = kernels.step_kernel


def _power_of_two(count: int, least: int = 1) -> int:
    return max(least, 1 << max(count - 1, 0).bit_length())


def _step(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    added: Tensor | None,
) -> Tensor:
    rows, inner = x.shape
    slots, kv_heads, width = keys.shape[1:]
    heads, padded = weight.shape[0] // width - 2 * kv_heads, _power_of_two(width, 16)
    o = torch.empty(rows, heads, width, dtype=x.dtype, device=x.device)
    if not o.numel():
        return o
    _kernel[(-(-rows // ROWS) * kv_heads,)](
        *(x, gamma, gamma if beta is None else beta, weight, weight if bias is None else bias, keys, values),
        *(length, length if added is None else added, o, rows, slots, eps, LOG2E * width**-0.5),
        D=inner,
        BD=_power_of_two(inner, 16),
        H=heads,
        G=kv_heads,
        K=width,
        BK=padded,
        BM=ROWS,
        BS=min(_power_of_two(slots), TILE // (ROWS * padded)),
        CENTRED=beta is not None,
        BIASED=bias is not None,
        MASKED=added is not None,
        num_warps=4,
        num_stages=1,
    )
    return o


_operator = torch.library.custom_op("trivium::norm_attention_step", _step, mutates_args=("keys", "values", "length"))


@_operator.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    kv_heads, width = rest[2].shape[2:]
    return torch.empty(x.shape[0], weight.shape[0] // width - 2 * kv_heads, width, dtype=x.dtype, device=x.device)


def by_triton(
    x_BTD: Tensor,
    norm: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    keys_BSGK: Tensor,
    values_BSGK: Tensor,
    length_B: Tensor,
    added_B: Tensor | None,
    window: int | None,
    empty: bool,
    parts: Any,
) -> Tensor:
    """Return o (B, T, H, K); arguments as in `norm_attention`."""
    if x_BTD.device.type == "cpu" and not interpreted():
        raise ValueError("x: on cpu; backend triton needs tensors on a GPU")
    if not (keys_BSGK.is_contiguous() and values_BSGK.is_contiguous()):
        raise ValueError("keys and values: backend triton needs contiguous caches")
    cache = keys_BSGK, values_BSGK, length_B, added_B
    (rows, tokens), slots = x_BTD.shape[:2], keys_BSGK.shape[1]
    if tokens == 1 and rows <= STEP_IN_ONE and slots <= STEP_SLOTS:
        own: Any = norm
        beta = own.bias if isinstance(norm, nn.LayerNorm) else None
        maps = own.weight, beta, weight.contiguous(), bias, own.eps
        return _operator(x_BTD[:, 0].contiguous(), *maps, *cache)[:, None]
    heads_BTNK = norm_linear(x_BTD, norm, weight, bias, "none").unflatten(-1, (-1, keys_BSGK.shape[3]))
    if tokens == 1:
        return step_by_triton(heads_BTNK[:, 0], *cache, None, "auto")[:, None]
    return prompt_operator(heads_BTNK, *cache, tokens if window is None else min(window, tokens))
