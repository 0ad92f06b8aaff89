"""The decode kernel of 2-simplicial attention: the newest queries of each row over ring buffers of keys and values.

Rows of a tile are BG heads of one group x BK slots of the short ring, virtual queries of one token as in the forward
kernel; columns are slots of the long ring, in memory's order. A slot's age follows from the row's length alone.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
import triton
import triton.language as tl

from trivium.ops.simplicial.triton_tiles import (
    FAR,
    LOG2E,
    gathered,
    load_rows,
    narrowed,
    product,
    virtual_queries,
)


@triton.jit
def readable(slot, length, tokens, t, slots, window):
    """Return whether query t of the newest `tokens` may read a slot: empty ones have ages beyond its position."""
    age = (length - 1 - slot + slots) % slots - (tokens - 1 - t)
    return (slot < slots) & (age >= 0) & (age < window) & (age <= length - tokens + t)


@triton.jit
def decode_kernel(
    q, k_long, v_long, k_short, v_short, lengths, o,
    q_b, q_t, q_h, kl_b, kl_c, kl_h, vl_b, vl_c, vl_h, ks_b, ks_c, ks_h, vs_b, vs_c, vs_h,
    tokens, heads, kv_heads, group, head_blocks, long_slots, short_slots, long, short, scale,
    D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr,
    SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o (B, T, H, D); one program is one query token of BG heads of one group."""
    program = tl.program_id(0)
    t = program // head_blocks
    g0 = (program % head_blocks) * BG
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = tl.program_id(1) % kv_heads
    h0 = kv * group + g0
    length = tl.load(lengths + b).to(tl.int32)
    channels = tl.arange(0, BD)
    q += b * q_b + t * q_t + h0 * q_h
    k_long += b * kl_b + kv * kl_h
    v_long += b * vl_b + kv * vl_h
    k_short += b * ks_b + kv * ks_h
    v_short += b * vs_b + kv * vs_h
    end = tl.minimum(length, long_slots)

    r = tl.arange(0, BG * BK)
    head = r // BK
    # The matrix unit adds at least 16 rows; several chunks of short keys are added by shuffles.
    GROUPS: tl.constexpr = BG if CHUNKS > 1 or BG > 16 else 16
    all_top = tl.full((BG,), FAR, tl.float32)
    all_total = tl.zeros((BG,), tl.float32)
    all_read = tl.zeros((GROUPS, BD), tl.float32)
    for chunk in range(CHUNKS):
        slot = chunk * BK + r % BK
        valid = readable(slot, length, tokens, t, short_slots, short) & (g0 + head < group)
        u = virtual_queries(q, k_short, head * q_h, slot * ks_c, valid, scale * LOG2E, SIGN, D, BD)
        acc = tl.zeros((BG * BK, BD), tl.float32)
        top = tl.full((BG * BK,), FAR, tl.float32)
        total = tl.zeros((BG * BK,), tl.float32)
        for j0 in tl.range(0, end, BN):
            j = j0 + tl.arange(0, BN)
            allowed = readable(j, length, tokens, t, long_slots, long)
            keys = load_rows(k_long, j * kl_c, allowed, channels, D, BD)
            logits = product(u, tl.trans(keys), None, PRECISION)
            logits = tl.where(allowed[None, :], logits, FAR)
            higher = tl.maximum(top, tl.max(logits, 1))
            shrink = tl.exp2(top - higher)
            weights = tl.exp2(logits - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            values = load_rows(v_long, j * vl_c, allowed, channels, D, BD)
            acc = product(narrowed(weights, values.dtype), values, acc * shrink[:, None], PRECISION)
            top = higher

        top = tl.where(valid, top, FAR)
        higher = tl.maximum(all_top, tl.max(tl.reshape(top, (BG, BK)), 1))
        of_row = tl.reshape(tl.broadcast_to(higher[:, None], (BG, BK)), (BG * BK,))
        share = tl.where(valid, tl.exp2(top - of_row), 0.0)
        shrink = tl.exp2(all_top - higher)
        all_total = all_total * shrink + tl.sum(tl.reshape(total * share, (BG, BK)), 1)
        values = load_rows(v_short, slot * vs_c, valid, channels, D, BD).to(tl.float32)
        if CHUNKS == 1:
            whole = tl.where(all_total > 0, all_total, 1.0)
            share /= tl.reshape(tl.broadcast_to(whole[:, None], (BG, BK)), (BG * BK,))
            all_read = gathered(acc * share[:, None] * values, head, GROUPS, PRECISION, q.dtype.element_ty)
        else:
            read = tl.sum(tl.reshape(acc * share[:, None] * values, (BG, BK, BD)), 1)
            all_read = all_read * shrink[:, None] + read
        all_top = higher
    if CHUNKS > 1:
        # A query before the first token has no key, and a row of zeros.
        all_read /= tl.where(all_total > 0, all_total, 1.0)[:, None]

    r = tl.arange(0, GROUPS)
    mask = ((r < BG) & (g0 + r < group))[:, None] & (channels < D)[None, :]
    at = (b * tokens + t) * heads + h0 + r
    tl.store(o + at[:, None] * D + channels[None, :], narrowed(all_read, o.dtype.element_ty), mask=mask)
