"""Launch the Hopper decode kernel, as an operator that torch.compile and CUDA graphs know."""

# Triton's types know neither launches in brackets nor compile-time layouts.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from typing import NamedTuple

import torch
from torch import Tensor

from trivium.ops.simplicial import operators
from trivium.ops.simplicial.decode_support import HOPPER_ROWS, padded_short
from trivium.ops.simplicial.hopper_decode import decode
from trivium.ops.simplicial.hopper_describe import described, laid_out, processors
from trivium.ops.simplicial.hopper_launch import LOG2E, RANGE
from trivium.ops.simplicial.launches import launch


class Plan(NamedTuple):
    """Long slots a tile; buffers of keys and of values; a consumer's registers, and those at entry."""

    N: int = 64
    K_STAGES: int = 4
    V_STAGES: int = 4
    registers: int = 240
    maxnreg: int = 168


def run(
    q: Tensor,
    k_long: Tensor,
    v_long: Tensor,
    k_short: Tensor,
    v_short: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """Return o (B, 1, H, D); rings no longer than their windows. `plan` is for measurements."""
    q, k_long, v_long, k_short, v_short, lengths = laid_out(q, k_long, v_long, k_short, v_short, lengths)
    batch, _, heads, width = q.shape
    slots1, slots2, kv_heads = k_long.shape[1], k_short.shape[1], k_long.shape[2]
    group, plan = heads // kv_heads, plan or Plan()
    W = padded_short(slots2)
    NH = HOPPER_ROWS // W
    # float16 has not the range for weights without a maximum.
    limit = RANGE if q.dtype == torch.bfloat16 else 0.0
    o = torch.empty_like(q)
    key = (q.shape, slots1, slots2, kv_heads, plan, q.dtype, lengths.dtype, q.device.index)
    keys, values = (described(x.view(batch, slots1, kv_heads * width), 1, plan.N, width) for x in (k_long, v_long))
    blocks = group // (2 * NH)
    steps = batch * kv_heads * blocks
    each = -(-steps // processors(q.device.index))
    programs = -(-steps // each)
    flags = torch.empty(2 * programs, device=q.device, dtype=torch.int32)
    launch(
        *(decode, key, (programs,)),
        *(q, k_short, v_short, keys, values, o, lengths, flags),
        *(steps, each, blocks, heads, kv_heads, slots1, slots2, scale * LOG2E),
        *(NH, W, plan.K_STAGES, plan.V_STAGES, limit, plan.registers),
        num_warps=4,
        maxnreg=plan.maxnreg,
    )
    return o


def _run(
    q: Tensor, k_long: Tensor, v_long: Tensor, k_short: Tensor, v_short: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    return run(q, k_long, v_long, k_short, v_short, lengths, scale)


_decode = operators.Operator("simplicial_hopper_decode", _run, operators.output_fake)


def hopper_decode(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    lengths: Tensor,
    *,
    window1: int,
    window2: int,
    scale: float,
    form: str,
) -> Tensor:
    """Return o (B, 1, H, D); arguments as in `simplicial_decode`, checked, and none that `hopper_refuses` names."""
    operators.check_rows("hopper", q=q, k1=k1, k2=k2, v1=v1, v2=v2)
    rings = (k1, v1, k2, v2) if k1.shape[1] >= k2.shape[1] else (k2, v2, k1, v1)
    return _decode(q, *rings, lengths, scale)
