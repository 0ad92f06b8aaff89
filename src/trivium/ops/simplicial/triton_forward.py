"""The forward kernel of 2-simplicial attention: tiles of virtual queries stream over the long window.

Every row keeps its own running maximum; the rows of one (query, head), which differ in their short key, are joined
at the end: o = sum_age w[age] v_short[age] * o[age], the softmax over both keys.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl

from trivium.ops.simplicial.triton_tiles import (
    FAR,
    LN2,
    LOG2E,
    allowed_pairs,
    gathered,
    load_keys,
    load_rows,
    narrowed,
    product,
    reach,
    same_document,
    tile_rows,
    virtual_queries,
)


@triton.jit
def _attend(
    acc, top, total, u, i, own, k, v, documents, begin, end, tokens, long, stride_k, stride_v,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for j0 in tl.range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        keys = load_keys(k, j, tokens, stride_k, D, BD, MASKED)
        logits = product(u, tl.trans(keys), None, PRECISION)
        if MASKED:
            allowed = allowed_pairs(i[:, None], j[None, :], own[:, None], documents, tokens, long, DOCUMENTS)
            logits = tl.where(allowed, logits, FAR)
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(logits - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = load_keys(v, j, tokens, stride_v, D, BD, MASKED)
        acc = acc * shrink[:, None]
        acc = product(narrowed(weights, values.dtype), values, acc, PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def forward_kernel(
    q, k_long, v_long, k_short, v_short, documents, o, lse,
    q_b, q_t, q_h, kl_b, kl_t, kl_h, vl_b, vl_t, vl_h, ks_b, ks_t, ks_h, vs_b, vs_t, vs_h,
    tokens, heads, kv_heads, group, head_blocks, long, short, scale,
    D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    EDGE: tl.constexpr, CHUNKS: tl.constexpr, SIGN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o (B, T, H, D) and lse (B, H, T); one program is BI queries of BG heads of one group."""
    program = tl.program_id(0)
    i0 = (program // head_blocks) * BI
    g0 = (program % head_blocks) * BG
    b = tl.program_id(1) // kv_heads
    kv = tl.program_id(1) % kv_heads
    h0 = kv * group + g0
    b = b.to(tl.int64)
    channels = tl.arange(0, BD)
    q += b * q_b + i0.to(tl.int64) * q_t + h0 * q_h
    k_long += b * kl_b + kv * kl_h
    v_long += b * vl_b + kv * vl_h
    k_short += b * ks_b + i0.to(tl.int64) * ks_t + kv * ks_h
    v_short += b * vs_b + i0.to(tl.int64) * vs_t + kv * vs_h
    if DOCUMENTS:
        documents += b * tokens
    begin, clear_begin, clear_end, end = reach(i0, tokens, long, BI, BN, EDGE, DOCUMENTS)

    QUERIES: tl.constexpr = BI * BG
    # The matrix unit adds at least 16 rows; several chunks of short keys are added by shuffles.
    GROUPS: tl.constexpr = QUERIES if CHUNKS > 1 or QUERIES > 16 else 16
    all_top = tl.full((QUERIES,), FAR, tl.float32)
    all_total = tl.zeros((QUERIES,), tl.float32)
    all_read = tl.zeros((GROUPS, BD), tl.float32)
    for chunk in range(CHUNKS):
        ii, head, age, valid = tile_rows(i0, g0, chunk * BK, tokens, group, short, BI, BG, BK)
        own = ii
        if DOCUMENTS:
            own, valid = same_document(documents, i0, ii, age, valid)
        i = i0 + ii
        k_offsets = (ii - age) * ks_t
        u = virtual_queries(q, k_short, ii * q_t + head * q_h, k_offsets, valid, scale * LOG2E, SIGN, D, BD)
        acc = tl.zeros((QUERIES * BK, BD), tl.float32)
        top = tl.full((QUERIES * BK,), FAR, tl.float32)
        total = tl.zeros((QUERIES * BK,), tl.float32)
        if BI > 1 and not DOCUMENTS:
            acc, top, total = _attend(
                acc, top, total, u, i, own, k_long, v_long, documents, begin, clear_begin, tokens, long, kl_t, vl_t,
                D, BD, EDGE, True, DOCUMENTS, PRECISION,
            )  # fmt: skip
        if not DOCUMENTS:
            acc, top, total = _attend(
                acc, top, total, u, i, own, k_long, v_long, documents, clear_begin, clear_end, tokens, long, kl_t, vl_t,
                D, BD, BN, False, DOCUMENTS, PRECISION,
            )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, u, i, own, k_long, v_long, documents, clear_end, end, tokens, long, kl_t, vl_t,
            D, BD, BN, True, DOCUMENTS, PRECISION,
        )  # fmt: skip

        top = tl.where(valid, top, FAR)
        higher = tl.maximum(all_top, tl.max(tl.reshape(top, (QUERIES, BK)), 1))
        share = tl.where(valid, tl.exp2(top - _spread(higher, QUERIES, BK)), 0.0)
        shrink = tl.exp2(all_top - higher)
        all_total = all_total * shrink + tl.sum(tl.reshape(total * share, (QUERIES, BK)), 1)
        values = load_rows(v_short, (ii - age) * vs_t, valid, channels, D, BD).to(tl.float32)
        if CHUNKS == 1:
            # A query past the end has no key, and a row of zeros.
            share /= _spread(tl.where(all_total > 0, all_total, 1.0), QUERIES, BK)
            r = tl.arange(0, QUERIES * BK)
            read = acc * share[:, None] * values
            all_read = gathered(read, r // BK, GROUPS, PRECISION, q.dtype.element_ty)
        else:
            read = tl.sum(tl.reshape(acc * share[:, None] * values, (QUERIES, BK, BD)), 1)
            all_read = all_read * shrink[:, None] + read
        all_top = higher
    if CHUNKS > 1:
        all_read /= tl.where(all_total > 0, all_total, 1.0)[:, None]

    r = tl.arange(0, GROUPS)
    i = i0 + r // BG
    head = g0 + r % BG
    mask = ((r < QUERIES) & (i < tokens) & (head < group))[:, None] & (channels < D)[None, :]
    at = (b * tokens + i) * heads + kv * group + head
    tl.store(o + at[:, None] * D + channels[None, :], narrowed(all_read, o.dtype.element_ty), mask=mask)
    r = tl.arange(0, QUERIES)
    i = i0 + r // BG
    head = g0 + r % BG
    exists = (i < tokens) & (head < group)
    at = (b * heads + kv * group + head) * tokens + i
    tl.store(lse + at, (all_top + tl.log2(tl.where(exists, all_total, 1.0))) * LN2, mask=exists)


@triton.jit
def _spread(x, QUERIES: tl.constexpr, BK: tl.constexpr):
    """Return x of each row's query."""
    return tl.reshape(tl.broadcast_to(x[:, None], (QUERIES, BK)), (QUERIES * BK,))
