"""One query a head over a long cache: programs share out the slots of each head, and a second kernel joins their parts.

The parts of a head are equal shares of the slots in use, as the count on the device says, so that one captured graph
serves every length and costs what that length costs.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium.ops.simplicial.triton_support import interpreted

SLOTS = 64  # of a tile
PROGRAMS = 1024  # that keep a GPU busy; a constant, so that sums are split alike on every GPU
LOG2E = 1.4426950408889634
# The logit of a slot that holds nothing: finite, so that its difference from itself is 0; beside any other it weighs 0.
FAR = tl.constexpr(-1e30)


@triton.jit
def _split_kernel(
    q, k, v, count, parts, bounds,
    q_b, q_h, k_b, k_s, k_g, v_b, v_s, v_g, heads, group, slots, scale,
    K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Write the weighted values of one share of one head, and its highest logit and sum of weights."""
    pair, split = tl.program_id(0), tl.program_id(1)
    b, h = pair // heads, pair % heads
    used = slots
    if COUNTED:
        used = tl.minimum(tl.load(count + b).to(tl.int32), slots)
    share = tl.cdiv(tl.cdiv(used, SPLITS), BS) * BS
    begin = split * share
    end = tl.minimum(begin + share, used)
    d = tl.arange(0, BK)
    wide = d < K
    query = tl.load(q + b * q_b + h * q_h + d, mask=wide, other=0.0).to(tl.float32) * scale
    k += b.to(tl.int64) * k_b + (h // group) * k_g
    v += b.to(tl.int64) * v_b + (h // group) * v_g
    # Each slot of a tile keeps a sum of its own: they are joined once, at the end.
    acc = tl.zeros([BS, BK], tl.float32)
    top = tl.full([BS], FAR, tl.float32)
    total = tl.zeros([BS], tl.float32)
    for s0 in tl.range(begin, end, BS):
        s = s0 + tl.arange(0, BS)
        inside = (s < end)[:, None] & wide[None, :]
        at = s.to(tl.int64)[:, None]
        keys = tl.load(k + at * k_s + d[None, :], mask=inside, other=0.0)
        values = tl.load(v + at * v_s + d[None, :], mask=inside, other=0.0)
        logits = tl.where(s < end, tl.sum(keys.to(tl.float32) * query[None, :], 1), FAR)
        higher = tl.maximum(top, logits)
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(logits - higher)
        total = total * shrink + weights
        acc = acc * shrink[:, None] + weights[:, None] * values.to(tl.float32)
        top = higher
    highest = tl.max(top, 0)
    shrink = tl.exp2(top - highest)
    place = pair * SPLITS + split
    tl.store(parts + place * BK + d, tl.sum(acc * shrink[:, None], 0))
    tl.store(bounds + 2 * place, highest)
    tl.store(bounds + 2 * place + 1, tl.sum(total * shrink, 0))


@triton.jit
def _join_kernel(
    parts, bounds, o, K: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BK)
    place = pair * SPLITS + split
    top = tl.load(bounds + 2 * place)
    weights = tl.exp2(top - tl.max(top, 0))  # an empty share's is 0
    total = tl.sum(weights * tl.load(bounds + 2 * place + 1), 0)
    shares = tl.load(parts + place[:, None] * BK + d[None, :])
    joined = tl.sum(weights[:, None] * shares, 0) / total
    tl.store(o + pair * K + d, joined.to(o.dtype.element_ty), mask=d < K)


_split: Any = _split_kernel
_join: Any = _join_kernel


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _launch(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, count_B: Tensor | None) -> Tensor:
    batch, heads, width = q_BHK.shape
    slots, kv_heads = k_BSGK.shape[1:3]
    pairs, padded = batch * heads, max(16, _power_of_two(width))
    splits = max(1, min(_power_of_two(PROGRAMS // max(pairs, 1)), _power_of_two(-(-slots // SLOTS)), 128))
    parts = torch.empty(pairs, splits, padded, dtype=torch.float32, device=q_BHK.device)
    bounds = torch.empty(pairs, splits, 2, dtype=torch.float32, device=q_BHK.device)
    o_BHK = torch.empty(batch, heads, width, dtype=q_BHK.dtype, device=q_BHK.device)
    if not pairs:
        return o_BHK
    strides = [stride for x in (q_BHK, k_BSGK, v_BSGK) for stride in x.stride()[:-1]]
    _split[(pairs, splits)](
        *(q_BHK, k_BSGK, v_BSGK, parts if count_B is None else count_B, parts, bounds, *strides),
        *(heads, heads // kv_heads, slots, LOG2E * width**-0.5),
        K=width,
        BK=padded,
        BS=SLOTS,
        SPLITS=splits,
        COUNTED=count_B is not None,
        num_warps=2,
    )
    _join[(pairs,)](parts, bounds, o_BHK, K=width, BK=padded, SPLITS=splits, num_warps=4)
    return o_BHK


_operator = torch.library.custom_op("trivium::cached_attention_triton", _launch, mutates_args=())


@_operator.register_fake
def _(q_BHK: Tensor, *rest: Any) -> Tensor:
    return torch.empty(q_BHK.shape, dtype=q_BHK.dtype, device=q_BHK.device)


def by_triton(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, count_B: Tensor | None) -> Tensor:
    """Return o (B, H, K); arguments as in `cached_attention`."""
    if q_BHK.device.type == "cpu" and not interpreted():
        raise ValueError("q: on cpu; backend triton needs tensors on a GPU")
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHK, k_BSGK, v_BSGK)]
    return _operator(*tensors, count_B)
