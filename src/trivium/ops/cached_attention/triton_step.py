"""One program a row writes its new token and goes through the row's cache, a tile of slots and all heads at a time.

The new token is taken from registers, not from the cache that is being written, so that nothing waits for the write.
Many rows of few slots have a program for each of their key heads, of one warp, whose sums stay within it.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium.ops.cached_attention.triton_split import LOG2E
from trivium.ops.simplicial.triton_support import interpreted

_TILE = 8192  # numbers of keys that a program holds at once
_HEAD_TILE = 1024  # those that a warp does
_MANY, _FEW = 128, 64  # rows from which on, and slots up to which, each head has a program
FAR = tl.constexpr(-1e30)


@triton.jit
def _step_kernel(
    heads, keys, values, length, added, o, slots, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    seen = tl.load(length + row)
    add = seen * 0 + 1
    if MASKED:
        add = tl.load(added + row)
    slot = (seen % slots).to(tl.int32)
    after = seen + add
    count = tl.minimum(tl.maximum(after, 1), slots).to(tl.int32)
    g, c = tl.arange(0, BG), tl.arange(0, BK)
    wide = (g < G)[:, None] & (c < K)[None, :]
    within = g[:, None] * K + c[None, :]
    heads += row.to(tl.int64) * (H + 2 * G) * K
    new_k = tl.load(heads + H * K + within, mask=wide, other=0.0)
    new_v = tl.load(heads + (H + G) * K + within, mask=wide, other=0.0)
    keys += row.to(tl.int64) * slots * G * K
    values += row.to(tl.int64) * slots * G * K
    s = tl.arange(0, BS)
    for member in range(H // G):
        at_q = (g[:, None] * (H // G) + member) * K + c[None, :]
        q = tl.load(heads + at_q, mask=wide, other=0.0).to(tl.float32) * scale
        top = tl.full((BG,), FAR, tl.float32)
        total = tl.zeros((BG,), tl.float32)
        acc = tl.zeros((BG, BK), tl.float32)
        for s0 in range(0, count, BS):
            place = (s0 + s)[:, None, None]
            inside = (place < count) & wide[None, :, :]
            fresh = (place == slot) & (add > 0)
            at = place * (G * K) + within[None, :, :]
            old = inside & (fresh == 0)
            k = tl.where(fresh, new_k[None, :, :], tl.load(keys + at, mask=old, other=0.0)).to(tl.float32)
            v = tl.where(fresh, new_v[None, :, :], tl.load(values + at, mask=old, other=0.0)).to(tl.float32)
            logits = tl.sum(k * q[None, :, :], 2)
            logits = tl.where((s0 + s)[:, None] < count, logits, FAR)
            higher = tl.maximum(top, tl.max(logits, 0))
            shrink = tl.exp2(top - higher)
            weights = tl.exp2(logits - higher[None, :])
            total = total * shrink + tl.sum(weights, 0)
            acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * v, 0)
            top = higher
        tl.store(o + row.to(tl.int64) * H * K + at_q, (acc / total[:, None]).to(o.dtype.element_ty), mask=wide)
    # What this row held before has been read by every thread.
    tl.debug_barrier()
    tl.store(keys + slot * (G * K) + within, new_k, mask=wide & (add > 0))
    tl.store(values + slot * (G * K) + within, new_v, mask=wide & (add > 0))
    tl.store(length + row, after)


@triton.jit
def _head_kernel(
    heads, keys, values, length, added, o, slots, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What `_step_kernel` does, of one key head of a row."""
    row, g = tl.program_id(0) // G, tl.program_id(0) % G
    # The upper half of a row's count holds how many of its programs have read it; the last of them writes the new one.
    before = tl.atomic_add(length + row, 4294967296, sem="relaxed")
    arrived, seen = before // 4294967296, before % 4294967296
    add = seen * 0 + 1
    if MASKED:
        add = tl.load(added + row)
    after = seen + add
    tl.store(length + row, after, mask=arrived == G - 1)
    slot = (seen % slots).to(tl.int32)
    count = tl.minimum(tl.maximum(after, 1), slots).to(tl.int32)
    c, s = tl.arange(0, BK), tl.arange(0, BS)
    wide = c < K
    heads += row.to(tl.int64) * (H + 2 * G) * K
    new_k = tl.load(heads + (H + g) * K + c, mask=wide, other=0.0)
    new_v = tl.load(heads + (H + G + g) * K + c, mask=wide, other=0.0)
    keys += row.to(tl.int64) * slots * G * K + g * K
    values += row.to(tl.int64) * slots * G * K + g * K
    for member in range(H // G):
        at_q = (g * (H // G) + member) * K + c
        q = tl.load(heads + at_q, mask=wide, other=0.0).to(tl.float32) * scale
        top, total = tl.full((), FAR, tl.float32), tl.full((), 0.0, tl.float32)
        acc = tl.zeros((BK,), tl.float32)
        for s0 in range(0, count, BS):
            place = s0 + s
            fresh = (place == slot) & (add > 0)
            old = ((place < count) & (fresh == 0))[:, None] & wide[None, :]
            at = place[:, None] * (G * K) + c[None, :]
            k = tl.where(fresh[:, None], new_k[None, :], tl.load(keys + at, mask=old, other=0.0)).to(tl.float32)
            v = tl.where(fresh[:, None], new_v[None, :], tl.load(values + at, mask=old, other=0.0)).to(tl.float32)
            logits = tl.where(place < count, tl.sum(k * q[None, :], 1), FAR)
            higher = tl.maximum(top, tl.max(logits, 0))
            shrink = tl.exp2(top - higher)
            weights = tl.exp2(logits - higher)
            total = total * shrink + tl.sum(weights, 0)
            acc = acc * shrink + tl.sum(weights[:, None] * v, 0)
            top = higher
        tl.store(o + row.to(tl.int64) * H * K + at_q, (acc / total).to(o.dtype.element_ty), mask=wide)
    # The slot that is written was not read.
    tl.store(keys + slot * (G * K) + c, new_k, mask=wide & (add > 0))
    tl.store(values + slot * (G * K) + c, new_v, mask=wide & (add > 0))


_kernel: Any = _step_kernel
_by_head: Any = _head_kernel


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def by_head(rows: int, slots: int, width: int) -> bool:
    """Say whether each key head of a row has a program of its own."""
    return rows >= _MANY and slots <= _FEW and width <= 128


def _launch(heads: Tensor, keys: Tensor, values: Tensor, length: Tensor, added: Tensor | None) -> Tensor:
    rows, packed, width = heads.shape
    slots, kv_heads = keys.shape[1:3]
    o = torch.empty(rows, packed - 2 * kv_heads, width, dtype=heads.dtype, device=heads.device)
    if not o.numel():
        return o
    wide = _power_of_two(kv_heads) * _power_of_two(width)
    tensors = heads, keys, values, length, length if added is None else added, o
    if by_head(rows, slots, width):
        _by_head[(rows * kv_heads,)](
            *(*tensors, slots, LOG2E * width**-0.5),
            H=packed - 2 * kv_heads,
            G=kv_heads,
            K=width,
            BK=_power_of_two(width),
            BS=max(1, min(_power_of_two(slots), _HEAD_TILE // _power_of_two(width))),
            MASKED=added is not None,
            num_warps=1,
        )
        return o
    _kernel[(rows,)](
        *(*tensors, slots, LOG2E * width**-0.5),
        H=packed - 2 * kv_heads,
        G=kv_heads,
        K=width,
        BG=_power_of_two(kv_heads),
        BK=_power_of_two(width),
        BS=max(1, min(_power_of_two(slots), _TILE // wide)),
        MASKED=added is not None,
        num_warps=4,
    )
    return o


_operator = torch.library.custom_op("trivium::cached_step", _launch, mutates_args=("keys", "values", "length"))


@_operator.register_fake
def _(heads: Tensor, keys: Tensor, values: Tensor, length: Tensor, added: Tensor | None) -> Tensor:
    kept = heads.shape[1] - 2 * keys.shape[2]
    return torch.empty(heads.shape[0], kept, heads.shape[2], dtype=heads.dtype, device=heads.device)


def by_triton(
    heads_BNK: Tensor,
    keys_BSGK: Tensor,
    values_BSGK: Tensor,
    length_B: Tensor,
    added_B: Tensor | None,
    held: Any,
    attention_backend: str,
) -> Tensor:
    """Return o (B, H, K); arguments as in `cached_step`."""
    if heads_BNK.device.type == "cpu" and not interpreted():
        raise ValueError("heads: on cpu; backend triton needs tensors on a GPU")
    if not (keys_BSGK.is_contiguous() and values_BSGK.is_contiguous()):
        raise ValueError("keys and values: backend triton needs contiguous caches")
    return _operator(heads_BNK.contiguous(), keys_BSGK, values_BSGK, length_B, added_B)
