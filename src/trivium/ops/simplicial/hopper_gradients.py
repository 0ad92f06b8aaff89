"""Launch the Hopper backward: the rows' statistics, the kernel, and the sums in the inputs' type."""

# Triton's types know neither launches in brackets nor compile-time layouts.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium.ops.simplicial.hopper_backward import backward
from trivium.ops.simplicial.hopper_describe import described, laid_out, processors
from trivium.ops.simplicial.launches import launch
from trivium.ops.simplicial.triton_launch import narrowed_parts

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ROWS: tl.constexpr = tl.constexpr(64)
STRIP = 32
BLOCK = 128  # virtual keys of a work item: four strips


class Tiles(NamedTuple):
    """How 64 rows of a tile are made of NI queries and NH heads; buffers of rows; a consumer's registers."""

    NI: int
    NH: int
    stages: int = 2
    registers: int = 240
    maxnreg: int = 168


class Items(NamedTuple):
    """Work items of a (batch row, key/value head): see `_item` in hopper_backward.py."""

    each: int
    full: int
    rest: int
    together: int


def tiles(group: int) -> Tiles:
    """Return the tiles for `group` query heads a key/value head."""
    heads = min(ROWS.value, group & -group)
    return Tiles(ROWS.value // heads, heads)


def items(tokens: int, long: int, short: int) -> Items:
    """Return the work items of windows `long` and `short`, at most `tokens` each."""
    strips = -(-(long + short - 1) // STRIP)
    full, rest = divmod(strips, 4)
    together = 4 // rest if rest else 1
    return Items(-(-tokens // together) * (together * full + (rest > 0)), full, rest, together)


@triton.jit
def statistics(
    do, o, lse, out, rows, tokens, heads, kv_heads, units, HB,
    NI: tl.constexpr, NH: tl.constexpr, D: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write out (tiles, 2, 64): the log-sum-exp in powers of two, negative, and delta = sum of do * o, 0 past the end.

    do and o are (B, T, H, D), lse (B, H, T); rows counts (B, units * NI, H).
    """
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, D)
    h = r % heads
    t = r // heads % (units * NI)
    b = r // heads // (units * NI)
    there = (r < rows) & (t < tokens)
    at = ((b * tokens + t) * heads + h)[:, None] * D + d[None, :]
    x = tl.load(do + at, mask=there[:, None], other=0.0).to(tl.float32)
    y = tl.load(o + at, mask=there[:, None], other=0.0).to(tl.float32)
    low = tl.load(lse + (b * heads + h) * tokens + t, mask=there, other=float("inf"))
    group = heads // kv_heads
    g = h % group
    tile = ((b * kv_heads + h // group) * units + t // NI) * HB + g // NH
    into = out + tile * (2 * ROWS) + t % NI * NH + g % NH
    tl.store(into, -low * LOG2E, mask=r < rows)
    tl.store(into + ROWS, tl.sum(x * y, 1), mask=r < rows)


@triton.jit
def finish(sums, dq, tokens, heads, kv_heads, units, HB, scale, NI: tl.constexpr, NH: tl.constexpr, D: tl.constexpr):
    """Write dq (B, T, H, D) = scale * sums, whose tiles lie in the order of the accumulators' registers."""
    tile = tl.program_id(0)
    x = tl.load(sums + tile.to(tl.int64) * (ROWS * D) + tl.arange(0, ROWS * D))
    # half of the channels, block of 8, warp, lane / 4, lane % 4, row bit 3, channel bit 0
    x = tl.reshape(x * scale, (2, D // 16, 4, 8, 4, 2, 2))
    x = tl.reshape(tl.permute(x, (2, 5, 3, 0, 1, 4, 6)), (ROWS, D))
    row = tl.arange(0, ROWS)
    pair = tile // HB // units
    t = tile // HB % units * NI + row // NH
    h = pair % kv_heads * (heads // kv_heads) + tile % HB * NH + row % NH
    at = ((pair // kv_heads * tokens + t).to(tl.int64) * heads + h) * D
    tl.store(dq + at[:, None] + tl.arange(0, D)[None, :], x.to(dq.dtype.element_ty), mask=(t < tokens)[:, None])


def hopper_backward(
    do: Tensor,
    q: Tensor,
    k1: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    o: Tensor,
    lse: Tensor,
    window1: int,
    window2: int,
    scale: float,
    *,
    plan: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk1, dv1, dk2, dv2 of trilinear attention; o and lse (B, Hq, T) are the forward's.

    Sums run in the order in which programs come: not the same bits twice. `plan` is for measurements.
    """
    do, q, k1, v1, k2, v2, o, lse = laid_out(do, q, k1, v1, k2, v2, o, lse)
    batch, tokens, heads, width = q.shape
    kv_heads = k1.shape[2]
    group = heads // kv_heads
    plan = plan or tiles(group)
    long, short = min(window1, tokens), min(window2, tokens)
    work = items(tokens, long, short)
    units, blocks = -(-tokens // plan.NI), group // plan.NH
    count = batch * kv_heads * units * blocks
    sizes = (tokens, heads, kv_heads, units, blocks)
    stats = torch.empty(count, 2, ROWS.value, dtype=torch.float32, device=q.device)
    sums = torch.zeros(count, ROWS.value * width, dtype=torch.float32, device=q.device)
    d_keys = torch.zeros(4, *k1.shape, dtype=torch.float32, device=q.device)
    rows = batch * units * plan.NI * heads
    key = (q.shape, kv_heads, long, short, plan, q.dtype, q.device.index)
    consts = (plan.NI, plan.NH, width)
    launch(statistics, key, (-(-rows // 32),), do, o, lse, stats, rows, *sizes, *consts, 32)
    queries, gradients = (described(x, 1, plan.NI, plan.NH, width) for x in (q, do))
    total = batch * kv_heads * work.each
    launch(
        backward, key, (min(total, processors(q.device.index)),),
        queries, gradients, stats, k1, k2, v1, v2, sums, *d_keys,
        total, work.each, work.full, work.rest, work.together,
        tokens, kv_heads, group, units, long, short, blocks, scale,
        plan.stages, plan.registers, num_warps=4, maxnreg=plan.maxnreg,
    )  # fmt: skip
    dq = torch.empty_like(q)
    launch(finish, key, (count,), sums, dq, *sizes, scale, *consts)
    dk1, dk2, dv1, dv2 = narrowed_parts(d_keys, q.dtype)
    return dq, dk1, dv1, dk2, dv2
