"""Launch the Hopper forward: choose tiles, and describe keys and values to the copy engine.

The backward pass is `hopper_gradients`', or the Triton backend's where that one refuses.
"""

# Triton's types know neither launches in brackets nor compile-time layouts.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trivium.ops.simplicial import hopper_support, operators, triton_launch
from trivium.ops.simplicial.hopper_describe import described, laid_out, processors, reciprocals
from trivium.ops.simplicial.hopper_forward import forward
from trivium.ops.simplicial.hopper_gradients import hopper_backward
from trivium.ops.simplicial.hopper_resident import resident_forward
from trivium.ops.simplicial.launches import launch

LOG2E = 1.4426950408889634
ROWS = 64  # of one warpgroup; two share their keys
# Log-sum-exps past this power of two take the online softmax: sums of 2^80 * |v| leave float32 room, and so does 2^-80.
# The kernel that keeps its keys sums |v1| |v2| before it divides: room for products from 2^-46 to 2^47 at these ends.
RANGE = 80.0
# Sequences up to which all keys of a head of width 32 stay in shared memory (measured at 128 tokens).
RESIDENT = 128


class Tiles(NamedTuple):
    """How 64 rows of a warpgroup are made of NI queries, NH heads and W short keys, and where the other group begins.

    N long keys a tile; buffers of keys, and as many of values; programs a processor, a consumer's registers, and those
    at entry.
    """

    NI: int
    NH: int
    WGI: int
    WGH: int
    W: int
    N: int
    STAGES: int
    ctas: int = 1
    registers: int = 240
    maxnreg: int = 168


def tiles(group: int, width: int, window2: int) -> Tiles:
    """Return the tiles for `group` query heads a key/value head."""
    W = 1 << (window2 - 1).bit_length()
    slots = ROWS // W
    NH = min(slots, group & -group)
    NI = slots // NH
    split_heads = (group // NH) % 2 == 0
    # Measured on an H200. Narrow heads leave registers and shared memory for two programs a processor, whose beginnings
    # and ends then overlap; 104 registers a consumer hold tiles of 32 keys.
    rest = (128, 2) if width == 128 else (32, 6, 2, 104, 80)
    return Tiles(NI, NH, 0 if split_heads else NI, NH if split_heads else 0, W, *rest)


def keeps_keys(plan: Tiles, tokens: int, width: int) -> bool:
    """Return whether the kernel that keeps all keys of a head in shared memory serves a call."""
    # Triton makes a constant of one token, which this kernel's casts of its bounds do not take.
    return width == 32 and 1 < tokens <= RESIDENT and plan.W <= 16


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
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, Hq, D) and its natural log-sum-exp (B, Hq, T) in float32; 8 <= window2 <= min(64, window1).

    `plan` is for measurements.
    """
    q, k1, k2, v1, v2 = laid_out(q, k1, k2, v1, v2)
    batch, tokens, heads, width = q.shape
    kv_heads = k1.shape[2]
    group = heads // kv_heads
    window1 = min(window1, tokens)
    plan = plan or tiles(group, width, window2)
    # float16 has not the range for weights without a maximum.
    limit = RANGE if q.dtype == torch.bfloat16 else 0.0
    # All that the kernel is compiled for follows from these.
    key = (q.shape, kv_heads, window1, window2, plan, q.dtype, q.device.index)
    units_i = -(-tokens // (plan.NI + plan.WGI))
    units, blocks = batch * kv_heads * units_i, group // (plan.NH + plan.WGH)
    resident = keeps_keys(plan, tokens, width)
    if resident:
        units *= blocks
    programs = min(units, plan.ctas * processors(q.device.index))
    each = -(-units // programs)
    if resident:
        programs = -(-units // each)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, device=q.device, dtype=torch.float32)
    flags = torch.empty(2 * programs, device=q.device, dtype=torch.int32)
    keys, values = (described(x.view(batch, tokens, kv_heads * width), 1, plan.N, width) for x in (k1, v1))
    if resident:
        launch(
            resident_forward, key, (programs,),
            q, k2, v2, keys, values, o, lse, flags,
            units, each, units_i, heads, kv_heads, tokens, window1, window2, scale * LOG2E,
            blocks, plan.NI, plan.NH, plan.WGI, plan.WGH, plan.W, -(-tokens // plan.N), limit, plan.registers,
            num_warps=4, maxnreg=plan.maxnreg,
        )  # fmt: skip
        return o, lse
    launch(
        forward, key, (programs,),
        q, k2, v2, keys, values, o, lse, flags,
        units, blocks, units_i, heads, kv_heads,
        *reciprocals(batch * kv_heads, units_i, kv_heads), tokens, window1, window2, scale * LOG2E,
        plan.NI, plan.NH, plan.WGI, plan.WGH, plan.W, plan.STAGES, limit, plan.registers,
        num_warps=4, maxnreg=plan.maxnreg,
    )  # fmt: skip
    return o, lse


def _run(
    q: Tensor,
    k_long: Tensor,
    v_long: Tensor,
    k_short: Tensor,
    v_short: Tensor,
    documents: Tensor | None,
    long: int,
    short: int,
    scale: float,
    sign: int,
) -> tuple[Tensor, Tensor]:
    return hopper_forward(q, k_long, k_short, v_long, v_short, long, short, scale)


def _run_backward(
    do: Tensor,
    q: Tensor,
    k_long: Tensor,
    v_long: Tensor,
    k_short: Tensor,
    v_short: Tensor,
    o: Tensor,
    lse: Tensor,
    long: int,
    short: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return hopper_backward(do, q, k_long, v_long, k_short, v_short, o, lse, long, short, scale)


_backward = operators.Operator("simplicial_hopper_backward", _run_backward, operators.gradients_fake)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    q, k_long, v_long, k_short, v_short, _, o, lse = saved
    long, short, scale, _ = ctx.rest
    facts = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "width": q.shape[3],
        "group": q.shape[2] // k_long.shape[2],
        "window1": long,
        "window2": short,
    }
    if hopper_support.refuses_backward(facts) is not None:
        return triton_launch.gradients_of(do, saved, ctx.rest)
    found = _backward(do, q, k_long, v_long, k_short, v_short, o, lse, long, short, scale)
    return (*found, None, None, None, None, None)


# The arguments of the Triton backend's operator, whose backward takes them; documents and sign are always None and 0.
_forward = operators.Operator(
    "simplicial_hopper_forward", _run, operators.attention_fake, _gradients, operators.remember
)


def hopper_simplicial(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    window1: int,
    window2: int,
    scale: float,
    form: str,
    bias: tuple[Tensor, Tensor] | None,
    documents: Tensor | None,
) -> Tensor:
    """Return o (B, T, H, D); arguments as in `simplicial_attention`, checked, and none that `refuses` names."""
    operators.check_rows("hopper", q=q, k1=k1, k2=k2, v1=v1, v2=v2)
    k2, v2 = operators.biased(k2, v2, bias)
    pairs = (k1, v1, k2, v2, None, window1, window2)
    if window1 < window2:
        pairs = (k2, v2, k1, v1, None, window2, window1)
    return _forward(q, *pairs, scale, 0)[0]
