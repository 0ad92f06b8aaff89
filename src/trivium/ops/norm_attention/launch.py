"""Launch the kernels of norm, projection and attention, as operators that torch.compile knows."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trivium.ops.cached_attention.triton_step import by_triton as step_by_triton
from trivium.ops.fused_linear.launch import norm_linear
from trivium.ops.norm_attention import kernels
from trivium.ops.packed_attention.launch import prompt_operator
from trivium.ops.simplicial.triton_support import interpreted

LOG2E = 1.4426950408889634


STEPS_IN_ONE, PROMPTS_IN_ONE = 4096, 0  # rows, and tokens of prompts, up to which one kernel does it all


class _Kernels(NamedTuple):
    """The kernels, whose launch syntax no type checker follows."""

    step: Any = kernels.step_kernel
    prompt: Any = kernels.prompt_kernel


_kernels = _Kernels()


class Tiles(NamedTuple):
    """Tokens and key heads of a program, slots that it reads at once, warps and stages."""

    tokens: int
    heads: int
    slots: int
    warps: int
    stages: int


def _power_of_two(count: int, least: int = 1) -> int:
    return max(least, 1 << max(count - 1, 0).bit_length())


def step_tiles(rows: int, slots: int, kv_heads: int, width: int) -> Tiles:
    """Return the tiles of one new token a row."""
    return Tiles(64, 1, min(_power_of_two(slots), 8), 8, 1)


def prompt_tiles(rows: int, tokens: int, kv_heads: int, width: int) -> Tiles:
    """Return the tiles of prompts."""
    return Tiles(64 if tokens <= 32 else 128, 1, 1, 4, 1)


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
    heads = weight.shape[0] // width - 2 * kv_heads
    o = torch.empty(rows, heads, width, dtype=x.dtype, device=x.device)
    if not o.numel():
        return o
    tiles = step_tiles(rows, slots, kv_heads, width)
    _kernels.step[(-(-rows // tiles.tokens) * (kv_heads // tiles.heads),)](
        *(x, gamma, gamma if beta is None else beta, weight, weight if bias is None else bias, keys, values),
        *(length, length if added is None else added, o, rows, slots, eps, LOG2E * width**-0.5),
        D=inner,
        BD=_power_of_two(inner, 16),
        H=heads,
        G=kv_heads,
        K=width,
        BK=_power_of_two(width, 16),
        BM=tiles.tokens,
        BS=tiles.slots,
        HEADS=tiles.heads,
        CENTRED=beta is not None,
        BIASED=bias is not None,
        MASKED=added is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return o


def _prompt(
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
    window: int,
) -> Tensor:
    rows, tokens, inner = x.shape
    slots, kv_heads, width = keys.shape[1:]
    heads = weight.shape[0] // width - 2 * kv_heads
    o = torch.empty(rows, tokens, heads, width, dtype=x.dtype, device=x.device)
    if not o.numel():
        return o
    tiles = prompt_tiles(rows, tokens, kv_heads, width)
    _kernels.prompt[(-(-rows // (tiles.tokens // tokens)) * (kv_heads // tiles.heads),)](
        *(x, gamma, gamma if beta is None else beta, weight, weight if bias is None else bias, keys, values),
        *(length, length if added is None else added, o, rows, tokens, slots, window, eps, LOG2E * width**-0.5),
        D=inner,
        BD=_power_of_two(inner, 16),
        H=heads,
        G=kv_heads,
        K=width,
        BK=_power_of_two(width, 16),
        BM=tiles.tokens,
        HEADS=tiles.heads,
        CENTRED=beta is not None,
        BIASED=bias is not None,
        MASKED=added is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return o


_CACHE = ("keys", "values", "length")
_step_operator = torch.library.custom_op("trivium::norm_attention_step", _step, mutates_args=_CACHE)
_prompt_operator = torch.library.custom_op("trivium::norm_attention_prompt", _prompt, mutates_args=_CACHE)


@_step_operator.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    kv_heads, width = rest[2].shape[2:]
    return torch.empty(x.shape[0], weight.shape[0] // width - 2 * kv_heads, width, dtype=x.dtype, device=x.device)


@_prompt_operator.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    kv_heads, width = rest[2].shape[2:]
    return torch.empty(*x.shape[:2], weight.shape[0] // width - 2 * kv_heads, width, dtype=x.dtype, device=x.device)


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
    held: Any,
    parts: Any,
) -> Tensor:
    """Return o (B, T, H, K); arguments as in `norm_attention`."""
    if x_BTD.device.type == "cpu" and not interpreted():
        raise ValueError("x: on cpu; backend triton needs tensors on a GPU")
    if not (keys_BSGK.is_contiguous() and values_BSGK.is_contiguous()):
        raise ValueError("keys and values: backend triton needs contiguous caches")
    own: Any = norm
    beta = own.bias if isinstance(norm, nn.LayerNorm) else None
    maps = own.weight, beta, weight.contiguous(), bias, own.eps
    cache = keys_BSGK, values_BSGK, length_B, added_B
    rows, tokens, width = *x_BTD.shape[:2], keys_BSGK.shape[3]
    window = tokens if window is None else min(window, tokens)
    if rows * tokens > (STEPS_IN_ONE if tokens == 1 else PROMPTS_IN_ONE):
        heads_BTNK = norm_linear(x_BTD, norm, weight, bias, "none").unflatten(-1, (-1, width))
        if tokens == 1:
            return step_by_triton(heads_BTNK[:, 0], *cache, None, "auto")[:, None]
        return prompt_operator(heads_BTNK, *cache, window)
    if tokens == 1:
        return _step_operator(x_BTD[:, 0].contiguous(), *maps, *cache)[:, None]
    return _prompt_operator(x_BTD.contiguous(), *maps, *cache, window)
