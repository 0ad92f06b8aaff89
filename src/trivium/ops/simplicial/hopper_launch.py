"""Launch the Hopper forward: choose tiles, describe keys and values to the copy engine, and bound the logits."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from trivium.ops.simplicial.hopper_forward import bounds, forward

LOG2E = 1.4426950408889634
ROWS = 64  # of one warpgroup; two share their keys
# Logits beyond this power of two take the online softmax. Sums of 2^80 * |v| leave float32 room, and so does 2^-80.
BOUND = 80.0


class Tiles(NamedTuple):
    """How 64 rows of a warpgroup are made of queries, heads and short keys, and what the other group adds."""

    NI: int
    NH: int
    WGI: int
    WGH: int
    W: int
    N: int
    K_STAGES: int
    V_STAGES: int


def tiles(group: int, width: int, window2: int) -> Tiles:
    """Return the tiles for `group` query heads a key/value head."""
    W = 1 << (window2 - 1).bit_length()
    slots = ROWS // W
    NH = min(slots, group & -group)
    NI = slots // NH
    split_heads = (group // NH) % 2 == 0
    N, stages = (128, (2, 2)) if width == 128 else (128, (3, 3))
    return Tiles(NI, NH, 0 if split_heads else NI, NH if split_heads else 0, W, N, *stages)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def hopper_forward(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    window1: int,
    window2: int,
    scale: float,
    *,
    plan: Tiles | None = None,
    bound: float | None = None,
    registers: int = 240,
    **knobs: Any,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, Hq, D) and its natural log-sum-exp (B, Hq, T) in float32; window2 <= 64 and window2 <= window1."""
    q, k1, k2, v1, v2 = (x.contiguous() for x in (q, k1, k2, v1, v2))
    batch, tokens, heads, width = q.shape
    kv_heads = k1.shape[2]
    group = heads // kv_heads
    plan = plan or tiles(group, width, window2)
    o = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, device=q.device, dtype=torch.float32)
    # float16 has not the range for weights without a maximum.
    limit = bound if bound is not None else BOUND if q.dtype == torch.bfloat16 else -1.0
    norms = torch.zeros(batch, kv_heads, 3, device=q.device, dtype=torch.float32)
    heads_a_load = min(8, 1 << (group - 1).bit_length())
    block = 128 // heads_a_load
    bounds[(-(-tokens // block), batch * kv_heads)](
        q, k2, k1, norms, tokens, group, kv_heads, block, heads_a_load, width, width
    )  # fmt: skip
    layout = gl.NVMMASharedLayout.get_default_for(
        [1, plan.N, width], gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    )
    keys, values = (
        TensorDescriptor.from_tensor(x.view(batch, tokens, kv_heads * width), [1, plan.N, width], layout)
        for x in (k1, v1)
    )
    units_i = -(-tokens // (plan.NI + plan.WGI))
    units = batch * kv_heads * units_i
    forward[(min(units, _processors(q.device.index or 0)),)](
        q, k2, v2, keys, values, o, lse, norms,
        units, group // (plan.NH + plan.WGH), units_i, heads, kv_heads, tokens, window1, window2, scale * LOG2E,
        plan.NI, plan.NH, plan.WGI, plan.WGH, plan.W, plan.K_STAGES, plan.V_STAGES,
        limit, registers, **knobs, num_warps=4,
    )  # fmt: skip
    return o, lse
