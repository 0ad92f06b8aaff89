"""The backward kernels of 2-simplicial attention: every tile is computed again from the saved log-sum-exp.

With u the virtual queries, w = do * v_short the virtual gradients (one row a query and short key), P and
dS = P (w v_long^T - delta):  dv_long = P^T w, dk_long = dS^T u, and from du = dS k_long and read = P v_long the rest:
dq sums du * k_short over short keys, dk_short and dv_short sum du * q and read * do over queries and heads.

`rows_kernel` owns queries: it keeps du and read in registers, and either adds its shares of dk_long and dv_long to
memory atomically, on Hopper by the copy engine (fast: six matrix products a tile), or leaves them to `long_kernel`,
which owns long keys (eight in all, nothing depends on the order in which programs run).
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl

from trivium.ops.simplicial.triton_tiles import (
    LN2,
    LOG2E,
    allowed_pairs,
    coefficient,
    gathered,
    load_keys,
    load_rows,
    narrowed,
    product,
    reach,
    same_document,
    tile_rows,
    turned,
    virtual_queries,
)

# How the rows kernel adds its shares of the long keys' gradients.
LEAVE: tl.constexpr = tl.constexpr(0)
ATOMIC: tl.constexpr = tl.constexpr(1)
COPIED: tl.constexpr = tl.constexpr(2)  # as ATOMIC, but whole tiles of BN keys by Hopper's copy engine


@triton.jit
def delta_kernel(
    do, o, delta, count, heads, tokens, do_b, do_t, do_h, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr
):
    """Write delta (B, H, T) = sum over channels of do * o, o being contiguous (B, T, H, D)."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    channels = tl.arange(0, BD)
    h = r % heads
    t = (r // heads) % tokens
    b = r // (heads * tokens)
    mask = (r < count)[:, None] & (channels < D)[None, :]
    x = tl.load(do + (b * do_b + t * do_t + h * do_h)[:, None] + channels[None, :], mask=mask, other=0.0)
    y = tl.load(o + (r * D)[:, None] + channels[None, :], mask=mask, other=0.0)
    tl.store(delta + (b * heads + h) * tokens + t, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), mask=r < count)


@triton.jit
def _tile(
    u, w, low, delta, i, own, keys, values, j, documents, tokens, long,
    MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return P and dS of a tile; `low` is the log-sum-exp in powers of two, infinite for rows that do not exist."""
    logits = product(u, tl.trans(keys), None, PRECISION)
    weights = tl.exp2(logits - low[:, None])
    if MASKED:
        allowed = allowed_pairs(i[:, None], j[None, :], own[:, None], documents, tokens, long, DOCUMENTS)
        weights = tl.where(allowed, weights, 0.0)
    d_weights = product(w, tl.trans(values), None, PRECISION)
    d_logits = weights * (d_weights - delta[:, None])
    return narrowed(weights, keys.dtype), narrowed(d_logits, keys.dtype)


@triton.jit
def _share(weights, rows, PRECISION: tl.constexpr):
    """Return weights^T rows; few columns go where the matrix unit of Hopper wants the short side."""
    if weights.shape[1] < 64 and rows.shape[1] >= 64:
        share = tl.trans(product(tl.trans(rows), weights, None, PRECISION))
    else:
        share = product(tl.trans(weights), rows, None, PRECISION)
    return share


@triton.jit
def _add_long(
    share, into, tiles, b, j0, column, tokens, stride,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Add a tile's share of the gradient of BN long keys from j0 to memory; the last ones may not exist."""
    if ADD == COPIED:
        tiles.atomic_add([b, j0, column], tl.reshape(share, (1, BN, BD)))
    else:
        j = j0 + tl.arange(0, BN)
        channels = tl.arange(0, BD)
        mask = (j < tokens)[:, None] & (channels < D)[None, :]
        tl.atomic_add(into + j[:, None] * stride + channels[None, :], share, mask=mask, sem="relaxed")


@triton.jit
def _rows_stretch(
    du, read, u, w, low, delta, i, own, k, v, dk, dv, dk_tiles, dv_tiles, b, column, documents,
    begin, end, tokens, long, stride_k, stride_v, stride_d,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    for j0 in tl.range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        keys = load_keys(k, j, tokens, stride_k, D, BD, MASKED)
        values = load_keys(v, j, tokens, stride_v, D, BD, MASKED)
        weights, d_logits = _tile(
            u, w, low, delta, i, own, keys, values, j, documents, tokens, long, MASKED, DOCUMENTS, PRECISION
        )
        if ADD != LEAVE:
            share = _share(weights, w, PRECISION)
            _add_long(share, dv, dv_tiles, b, j0, column, tokens, stride_d, D, BD, BN, ADD)
        read = product(weights, values, read, PRECISION)
        if ADD != LEAVE:
            share = _share(d_logits, u, PRECISION) * LN2
            _add_long(share, dk, dk_tiles, b, j0, column, tokens, stride_d, D, BD, BN, ADD)
        du = product(d_logits, keys, du, PRECISION)
    return du, read


@triton.jit
def _term(
    x, y, offsets, valid, scale, TERM: tl.constexpr, TURN: tl.constexpr, SIGN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Return scale * x * (the rows of y, turned by TURN channels), with the coefficient of a term."""
    channels = tl.arange(0, BD)
    if SIGN == 0:
        product = x * load_rows(y, offsets, valid, channels, D, BD).to(tl.float32)
    else:
        factor = load_rows(y, offsets, valid, turned(channels, TURN, D), D, BD).to(tl.float32)
        product = x * factor * coefficient(channels, TERM, SIGN, D)[None, :]
    return product * scale


@triton.jit
def _add_short(
    into, x, place, at, mask, target, stride, ATOMICALLY: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Add the sums of rows x by short key to a gradient, or to the program's own part of a workspace."""
    sums = gathered(x, place, PLACES, PRECISION, dtype)
    pointers = into + at[:, None] * stride + target[None, :]
    mask = mask[:, None] & (tl.arange(0, BD) < D)[None, :]
    if ATOMICALLY:
        tl.atomic_add(pointers, sums, mask=mask, sem="relaxed")
    else:
        # Another thread may have written this place just before.
        tl.debug_barrier()
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + sums, mask=mask)


@triton.jit
def rows_kernel(
    q, k_long, v_long, k_short, v_short, documents, do, lse, delta, dq, dk_long, dv_long,
    dk_short, dv_short, dk_tiles, dv_tiles,
    q_b, q_t, q_h, kl_b, kl_t, kl_h, vl_b, vl_t, vl_h, ks_b, ks_t, ks_h, vs_b, vs_t, vs_h, do_b, do_t, do_h,
    first, tokens, heads, kv_heads, group, head_parts, long, short, scale, dq_term,
    D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    EDGE: tl.constexpr, PLACES: tl.constexpr, CHUNKS: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    SIGN: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Write dq and add the shares of BI queries of HEAD_BLOCKS * BG heads to the gradients of the keys.

    With ADD = LEAVE, dk_short and dv_short are workspaces (rows, T / BI, short + BI - 1, D), a part for each program.
    With ADD = COPIED, dk_tiles and dv_tiles describe tiles (1, BN, D) of dk_long and dv_long as (B, T, Hkv * D).
    """
    program = tl.program_id(0)
    i0 = (program // head_parts) * BI
    row = first + tl.program_id(1)
    batch_row = row // kv_heads
    b = batch_row.to(tl.int64)
    kv = row % kv_heads
    channels = tl.arange(0, BD)
    q += b * q_b + i0.to(tl.int64) * q_t + kv * group * q_h
    do += b * do_b + i0.to(tl.int64) * do_t + kv * group * do_h
    k_long += b * kl_b + kv * kl_h
    v_long += b * vl_b + kv * vl_h
    k_short += b * ks_b + i0.to(tl.int64) * ks_t + kv * ks_h
    v_short += b * vs_b + i0.to(tl.int64) * vs_t + kv * vs_h
    lse += (b * heads + kv * group) * tokens + i0
    delta += (b * heads + kv * group) * tokens + i0
    if DOCUMENTS:
        documents += b * tokens
    stride_d = kv_heads * D
    if ADD != LEAVE:
        dk_long += (b * tokens * kv_heads + kv) * D
        dv_long += (b * tokens * kv_heads + kv) * D
    if ADD == LEAVE:
        part = tl.cdiv(tokens, BI) * (short + BI - 1) * D
        dk_short += tl.program_id(1).to(tl.int64) * part
        dv_short += tl.program_id(1).to(tl.int64) * part
    else:
        dk_short += (b * tokens * kv_heads + kv) * D
        dv_short += (b * tokens * kv_heads + kv) * D
    begin, clear_begin, clear_end, end = reach(i0, tokens, long, BI, BN, EDGE, DOCUMENTS)

    QUERIES: tl.constexpr = BI * BG
    GROUPS: tl.constexpr = 16 if QUERIES < 16 else QUERIES
    dtype: tl.constexpr = q.dtype.element_ty
    for block in range(HEAD_BLOCKS):
        g0 = ((program % head_parts) * HEAD_BLOCKS + block) * BG
        dq_sum = tl.zeros((GROUPS, BD), tl.float32)
        dq_turned = tl.zeros((GROUPS, BD), tl.float32)
        for chunk in range(CHUNKS):
            ii, head, age, valid = tile_rows(i0, g0, chunk * BK, tokens, group, short, BI, BG, BK)
            own = ii
            if DOCUMENTS:
                own, valid = same_document(documents, i0, ii, age, valid)
            i = i0 + ii
            q_offsets = ii * q_t + (g0 + head) * q_h
            do_offsets = ii * do_t + (g0 + head) * do_h
            k_offsets = (ii - age) * ks_t
            v_offsets = (ii - age) * vs_t
            u = virtual_queries(q, k_short, q_offsets, k_offsets, valid, scale * LOG2E, SIGN, D, BD)
            w = virtual_queries(do, v_short, do_offsets, v_offsets, valid, 1.0, 0, D, BD)
            at = (g0 + head) * tokens + ii
            low = tl.load(lse + at, mask=valid, other=float("inf")) * LOG2E
            row_delta = tl.load(delta + at, mask=valid, other=0.0)
            du = tl.zeros((QUERIES * BK, BD), tl.float32)
            read = tl.zeros((QUERIES * BK, BD), tl.float32)
            if BI > 1 and not DOCUMENTS:
                du, read = _rows_stretch(
                    du, read, u, w, low, row_delta, i, own, k_long, v_long,
                    dk_long, dv_long, dk_tiles, dv_tiles, batch_row, kv * D, documents,
                    begin, clear_begin, tokens, long, kl_t, vl_t, stride_d,
                    D, BD, EDGE, True, DOCUMENTS, PRECISION, ATOMIC if ADD == COPIED else ADD,
                )  # fmt: skip
            if not DOCUMENTS:
                du, read = _rows_stretch(
                    du, read, u, w, low, row_delta, i, own, k_long, v_long,
                    dk_long, dv_long, dk_tiles, dv_tiles, batch_row, kv * D, documents,
                    clear_begin, clear_end, tokens, long, kl_t, vl_t, stride_d,
                    D, BD, BN, False, DOCUMENTS, PRECISION, ADD,
                )  # fmt: skip
            du, read = _rows_stretch(
                du, read, u, w, low, row_delta, i, own, k_long, v_long,
                dk_long, dv_long, dk_tiles, dv_tiles, batch_row, kv * D, documents,
                clear_end, end, tokens, long, kl_t, vl_t, stride_d,
                D, BD, BN, True, DOCUMENTS, PRECISION, ADD,
            )  # fmt: skip

            # Rows of neighbouring queries that share a short key are added up here.
            place = ii - age + (chunk + 1) * BK - 1
            p = tl.arange(0, PLACES)
            key = i0 + p - (chunk + 1) * BK + 1
            exists = (p < BI + BK - 1) & (key >= 0) & (key < tokens) & (key > i0 - short)
            at = key
            stride_s = stride_d
            if ADD == LEAVE:
                at = i0 // BI * (short + BI - 1) + key - i0 + short - 1
                stride_s = D
            x = _term(read, do, do_offsets, valid, 1.0, 0, 0, 0, D, BD)
            _add_short(
                dv_short, x, place, at, exists, channels, stride_s, ADD != LEAVE, D, BD, PLACES, PRECISION, dtype
            )
            target = turned(channels, 1, D) if SIGN != 0 else channels
            x = _term(du, q, q_offsets, valid, scale, 0, 2, SIGN, D, BD)
            _add_short(dk_short, x, place, at, exists, target, stride_s, ADD != LEAVE, D, BD, PLACES, PRECISION, dtype)
            query_of_row = tl.arange(0, QUERIES * BK) // BK
            x = _term(du, k_short, k_offsets, valid, scale, 0, 1, SIGN, D, BD)
            dq_sum += gathered(x, query_of_row, GROUPS, PRECISION, dtype)
            if SIGN != 0:
                target = turned(channels, 2, D)
                x = _term(du, q, q_offsets, valid, scale, 1, 1, SIGN, D, BD)
                _add_short(
                    dk_short, x, place, at, exists, target, stride_s, ADD != LEAVE, D, BD, PLACES, PRECISION, dtype
                )
                x = _term(du, k_short, k_offsets, valid, scale, 1, 2, SIGN, D, BD)
                dq_turned += gathered(x, query_of_row, GROUPS, PRECISION, dtype)
        r = tl.arange(0, GROUPS)
        i = i0 + r // BG
        head = g0 + r % BG
        mask = ((r < QUERIES) & (i < tokens) & (head < group))[:, None] & (channels < D)[None, :]
        at = ((b * tokens + i) * heads + kv * group + head)[:, None] * D
        if SIGN == 0:
            tl.store(dq + at + channels[None, :], narrowed(dq_sum, dq.dtype.element_ty), mask=mask)
        else:
            tl.store(dq + at + turned(channels, 2, D)[None, :], dq_sum, mask=mask)
            tl.store(dq + dq_term + at + turned(channels, 1, D)[None, :], dq_turned, mask=mask)


@triton.jit
def _keys_first_tile(
    u, w, low, delta, i, own, keys, values, j, documents, tokens, long,
    MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return P and dS of a tile, long keys first; `low` is the log-sum-exp in powers of two, infinite for no row.

    Long keys come first because the matrix unit takes its second operand from shared memory alone: u and w, which a
    program keeps for many tiles, would fill the registers as first ones.
    """
    logits = product(keys, tl.trans(u), None, PRECISION)
    weights = tl.exp2(logits - low[None, :])
    if MASKED:
        allowed = allowed_pairs(i[None, :], j[:, None], own[None, :], documents, tokens, long, DOCUMENTS)
        weights = tl.where(allowed, weights, 0.0)
    d_weights = product(values, tl.trans(w), None, PRECISION)
    d_logits = weights * (d_weights - delta[None, :])
    return narrowed(weights, keys.dtype), narrowed(d_logits, keys.dtype)


@triton.jit
def long_kernel(
    q, k_long, v_long, k_short, v_short, documents, do, lse, delta, dk_long, dv_long,
    q_b, q_t, q_h, kl_b, kl_t, kl_h, vl_b, vl_t, vl_h, ks_b, ks_t, ks_h, vs_b, vs_t, vs_h, do_b, do_t, do_h,
    tokens, heads, kv_heads, group, head_blocks, long, short, scale, part_stride,
    D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    CHUNKS: tl.constexpr, SIGN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one part's share of dk_long and dv_long (parts, B, T, Hkv, D) of BN long keys, in fp32.

    A part walks an equal share of the tiles (queries, heads, short keys) that can read the keys.
    """
    j0 = tl.program_id(0) * BN
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = tl.program_id(1) % kv_heads
    part = tl.program_id(2)
    channels = tl.arange(0, BD)
    q += b * q_b + kv * group * q_h
    do += b * do_b + kv * group * do_h
    k_short += b * ks_b + kv * ks_h
    v_short += b * vs_b + kv * vs_h
    lse += (b * heads + kv * group) * tokens
    delta += (b * heads + kv * group) * tokens
    if DOCUMENTS:
        documents += b * tokens
    j = j0 + tl.arange(0, BN)
    keys = load_keys(k_long + b * kl_b + kv * kl_h, j, tokens, kl_t, D, BD, True)
    values = load_keys(v_long + b * vl_b + kv * vl_h, j, tokens, vl_t, D, BD, True)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)

    inner = head_blocks * CHUNKS
    queries = tl.minimum(j0 + BN - 1 + long, tokens) - j0
    tiles = tl.cdiv(queries, BI) * inner
    each = tl.cdiv(tiles, tl.num_programs(2))
    for tile in tl.range(part * each, tl.minimum((part + 1) * each, tiles)):
        i0 = j0 + tile // inner * BI
        g0 = (tile % inner) // CHUNKS * BG
        age0 = (tile % CHUNKS) * BK
        ii, head, age, valid = tile_rows(i0, g0, age0, tokens, group, short, BI, BG, BK)
        own = ii
        if DOCUMENTS:
            own, valid = same_document(documents, i0, ii, age, valid)
        i = i0 + ii
        q_offsets = i * q_t + (g0 + head) * q_h
        do_offsets = i * do_t + (g0 + head) * do_h
        u = virtual_queries(q, k_short, q_offsets, (i - age) * ks_t, valid, scale * LOG2E, SIGN, D, BD)
        w = virtual_queries(do, v_short, do_offsets, (i - age) * vs_t, valid, 1.0, 0, D, BD)
        at = (g0 + head) * tokens + i
        low = tl.load(lse + at, mask=valid, other=float("inf")) * LOG2E
        row_delta = tl.load(delta + at, mask=valid, other=0.0)
        weights, d_logits = _keys_first_tile(
            u, w, low, row_delta, i, own, keys, values, j, documents, tokens, long, True, DOCUMENTS, PRECISION
        )
        dv = product(weights, w, dv, PRECISION)
        dk = product(d_logits, u, dk, PRECISION)
    mask = (j < tokens)[:, None] & (channels < D)[None, :]
    at = part * part_stride + ((b * tokens + j) * kv_heads + kv)[:, None] * D + channels[None, :]
    tl.store(dk_long + at, dk * LN2, mask=mask)
    tl.store(dv_long + at, dv, mask=mask)
