"""Forward of trilinear 2-simplicial attention for Hopper where all keys of a head fit into shared memory beside others.

As hopper_forward.py, but for sequences so short that the beginning and the end of a tile of rows weigh more than its
loop: keys and values of one head are brought as a whole, while the head before is worked on, so that a tile of rows
waits for nothing, and its end stays in registers: 16 or fewer short keys of a query are the rows of one warp.
"""

# Gluon functions are typed for its compiler: their layouts and blocks are compile-time values.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from trivium.ops.simplicial.hopper_tiles import (
    agree,
    agreement,
    inverse,
    log2,
    masked,
    row_sums,
    rows_layout,
    told,
    weigh,
)

SLOTS = gl.constexpr(2)  # heads whose keys and values are in shared memory at a time


@gluon.jit
def _widened(x):
    """Return x in float32; of bfloat16 one instruction a number, where a conversion takes two of every other one."""
    if x.dtype == gl.bfloat16:
        y = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], gl.float32, True, 2
        )
    else:
        y = x.to(gl.float32)
    return y


@gluon.jit
def _times(x, y):
    """Return the product of 32-bit numbers in 64 bits: one instruction, which LLVM does not find out of a loop."""
    return gl.inline_asm_elementwise("mul.wide.s32 $0, $1, $2;", "=l,r,r", [x, y], gl.int64, True, 1)


@gluon.jit
def _queries(ptr, b, head, i, tokens, end, heads, NI: gl.constexpr, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr):
    """Return q (G, 1, D) of the queries i.. before `end` and heads head..; 0 for others."""
    L: gl.constexpr = rows_layout(NI * NH, W, D)
    g = gl.expand_dims(gl.expand_dims(gl.arange(0, NI * NH, gl.SliceLayout(1, gl.SliceLayout(2, L))), 1), 2)
    d = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    row = _times(b * tokens + i + g // NH, heads) * D
    return gl.load(ptr + (head + g % NH) * D + row + d, mask=(i + g // NH < end) & (d >= 0), other=0.0)


@gluon.jit
def _short_keys(
    ptr, b, kv_head, i, tokens, end, kv_heads, window2,
    NI: gl.constexpr, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Return k2 (G, W, D) of the short windows of the queries i..; 0 where there is no key before `end`."""
    L: gl.constexpr = rows_layout(NI * NH, W, D)
    g = gl.expand_dims(gl.expand_dims(gl.arange(0, NI * NH, gl.SliceLayout(1, gl.SliceLayout(2, L))), 1), 2)
    w = gl.expand_dims(gl.expand_dims(gl.arange(0, W, gl.SliceLayout(0, gl.SliceLayout(2, L))), 0), 2)
    d = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    k = i + g // NH - window2 + 1 + w
    row = _times(b * tokens + k, kv_heads) * D
    mask = (k.to(gl.uint32) < end.to(gl.uint32)) & (w < window2)
    return gl.load(ptr + kv_head * D + row + d, mask=mask & (d >= 0), other=0.0)


@gluon.jit
def _short_values(
    ptr, b, kv_head, i, tokens, kv_heads, window2,
    NI: gl.constexpr, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Return v2 (ROWS, D) of the rows in the layout OUT; 0 where there is no key."""
    r = gl.arange(0, NI * NH * W, gl.SliceLayout(1, OUT))
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, OUT)), 0)
    k = i + r // (NH * W) - window2 + 1 + r % W
    row = _times(b * tokens + k, kv_heads) * D
    mask = (k.to(gl.uint32) < tokens.to(gl.uint32)) & (r % W < window2)
    return gl.load(ptr + kv_head * D + gl.expand_dims(row, 1) + d, mask=gl.expand_dims(mask, 1) & (d >= 0), other=0.0)


@gluon.jit
def _store(ptr, o, b, head, i, tokens, heads, NH: gl.constexpr, LAYOUT: gl.constexpr):
    """Write o (G, D) in the layout LAYOUT."""
    D: gl.constexpr = o.shape[1]
    g = gl.arange(0, o.shape[0], gl.SliceLayout(1, LAYOUT))
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, LAYOUT)), 0)
    row = _times(b * tokens + i + g // NH, heads) * D + (head + g % NH) * D
    there = gl.expand_dims(i + g // NH < tokens, 1) & (d >= 0)
    gl.store(ptr + gl.expand_dims(row, 1) + d, o.to(ptr.dtype.element_ty), mask=there)


@gluon.jit
def _bring(k_desc, v_desc, full, empty, k_buffers, v_buffers, done, row, rows, kv_heads, TILES: gl.constexpr):
    """Copy keys and values of the heads row.. of `rows` into the slots, after `done` others."""
    N: gl.constexpr = k_desc.block_type.shape[1]
    D: gl.constexpr = k_desc.block_type.shape[2]
    for n in range(done, done + rows):
        slot = n % SLOTS
        b = (row + n - done) // kv_heads
        head = (row + n - done) % kv_heads
        mbarrier.wait(empty.index(slot), (n // SLOTS & 1) ^ 1)
        mbarrier.expect(full.index(slot), 2 * TILES * k_desc.block_type.nbytes)
        for tile in gl.static_range(TILES):
            into = slot * TILES + tile
            tma.async_copy_global_to_shared(k_desc, [b, tile * N, head * D], full.index(slot), k_buffers.index(into))
            tma.async_copy_global_to_shared(v_desc, [b, tile * N, head * D], full.index(slot), v_buffers.index(into))


@gluon.jit
def _produce(
    k_desc, v_desc, full, empty, k_buffers, v_buffers, flags, agreed, row, rows, kv_heads,
    TILES: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    _bring(k_desc, v_desc, full, empty, k_buffers, v_buffers, 0, row, rows, kv_heads, TILES)
    if LIMIT > 0:  # noqa: SIM102 - known when compiling
        if told(flags, agreed):
            _bring(k_desc, v_desc, full, empty, k_buffers, v_buffers, rows, row, rows, kv_heads, TILES)


@gluon.jit
def _attend(u, k_buffers, v_buffers, base, begin, end, low, clear, i, i_row, window1, FAST: gl.constexpr):
    """Return (o, m, l) of the tile's rows over the key tiles from `begin` to `end` of the slot at `base`.

    o is not divided by l. All rows read the keys from `clear` to i.
    """
    N: gl.constexpr = k_buffers.type.shape[2]
    D: gl.constexpr = k_buffers.type.shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    LS: gl.constexpr = gl.SliceLayout(1, S)
    LO: gl.constexpr = gl.SliceLayout(1, OUT)
    ROWS: gl.constexpr = u.shape[0]
    nothing = gl.zeros([ROWS, N], gl.float32, S)
    o = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, OUT))
    m = gl.full([ROWS], -float("inf"), gl.float32, LS)
    total = row_sums(nothing, FAST)
    k_tile = k_buffers.index(base + begin).reshape([N, D]).permute([1, 0])
    s_now = warpgroup_mma(u, k_tile, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_now])
    if (begin * N < clear) | (begin * N + N > i + 1):
        s = masked(s, begin * N, low, i_row, window1, 2, S)
    p, m, total, _ = weigh(s, m, total, FAST, FAST)
    p16 = gl.convert_layout(p.to(k_buffers.dtype), P)
    for tile in range(begin + 1, end):
        k_tile = k_buffers.index(base + tile).reshape([N, D]).permute([1, 0])
        s_now = warpgroup_mma(u, k_tile, nothing, use_acc=False, is_async=True)
        o = warpgroup_mma(p16, v_buffers.index(base + tile - 1).reshape([N, D]), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_now])
        first = tile * N
        if (first < clear) | (first + N > i + 1):
            s = masked(s, first, low, i_row, window1, 2, S)
        p, m, total, alpha = weigh(s, m, total, FAST, FAST)
        o_now, p16, p = warpgroup_mma_wait(0, deps=[o, p16, p])
        if not FAST:
            o_now = o_now * gl.expand_dims(gl.convert_layout(alpha, LO), 1)
        o = warpgroup_mma_init(o_now)
        p16 = gl.convert_layout(p.to(k_buffers.dtype), P)
    o = warpgroup_mma(p16, v_buffers.index(base + end - 1).reshape([N, D]), o, is_async=True)
    o_now, p16 = warpgroup_mma_wait(0, deps=[o, p16])
    if FAST:
        total = gl.convert_layout(gl.sum(total, 1), LS)
    return o_now, m, total


@gluon.jit
def _rows(
    GROUP: gl.constexpr, FAST: gl.constexpr, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, u_buffers,
    full, empty, k_buffers, v_buffers, first, last, row0, done,
    units_i, heads, kv_heads, tokens, window1, window2, scale,
    HB: gl.constexpr, NI: gl.constexpr, NH: gl.constexpr, WGI: gl.constexpr, WGH: gl.constexpr, W: gl.constexpr,
    TILES: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Do this warpgroup's rows of the units first..last, after `done` heads; return if a log-sum-exp is past LIMIT."""
    N: gl.constexpr = k_buffers.type.shape[2]
    D: gl.constexpr = k_buffers.type.shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    G: gl.constexpr = NI * NH
    ROWS: gl.constexpr = G * W
    LG: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, rows_layout(G, W, D)))
    g = gl.arange(0, G, LG)
    bad = gl.zeros([G], gl.int32, LG)
    u_buffer = u_buffers.index(GROUP)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, S))
    group = heads // kv_heads

    block = first % HB
    row = first // (HB * units_i)
    first_i = (first // HB - row * units_i) * (NI + WGI)
    b = row // kv_heads
    kv_head = row - b * kv_heads
    i = first_i + GROUP * WGI
    head = kv_head * group + block * (NH + WGH) + GROUP * WGH
    q = _queries(q_ptr, b, head, i, tokens, tokens, heads, NI, NH, W, D)
    k2 = _short_keys(k2_ptr, b, kv_head, i, tokens, tokens, kv_heads, window2, NI, NH, W, D)
    before = row - 1
    for unit in range(first, last):
        u = (_widened(q) * scale) * _widened(k2)
        u_buffer.store(u.to(k_buffers.dtype).reshape([ROWS, D]))
        fence_async_shared()
        i_row = i + r // (NH * W)
        low = gl.maximum(i - window1 + 1, 0)

        # The place of the next unit, by counting. Its queries come from device memory: fetch them now.
        over = block + 1 == HB
        next_block = gl.where(over, 0, block + 1)
        next_first = gl.where(over, first_i + NI + WGI, first_i)
        over = next_first >= tokens
        next_first = gl.where(over, 0, next_first)
        next_row = gl.where(over, row + 1, row)
        next_kv = gl.where(over, kv_head + 1, kv_head)
        over = next_kv == kv_heads
        next_kv = gl.where(over, 0, next_kv)
        next_b = gl.where(over, b + 1, b)
        next_i = next_first + GROUP * WGI
        next_head = next_kv * group + next_block * (NH + WGH) + GROUP * WGH
        next_end = gl.where(unit + 1 < last, tokens, 0)
        q = _queries(q_ptr, next_b, next_head, next_i, tokens, next_end, heads, NI, NH, W, D)
        v2 = _short_values(v2_ptr, b, kv_head, i, tokens, kv_heads, window2, NI, NH, W, D, OUT)

        count = done + row - row0
        slot = count % SLOTS
        if row != before:
            mbarrier.wait(full.index(slot), count // SLOTS & 1)
        tile0 = gl.maximum(first_i - window1 + 1, 0) // N
        tile1 = (gl.minimum(first_i + NI + WGI, tokens) - 1) // N + 1
        o, m, total = _attend(
            u_buffer, k_buffers, v_buffers, slot * TILES, tile0, tile1, low, i + NI - window1, i, i_row, window1, FAST
        )
        if (next_row != row) | (unit + 1 == last):
            mbarrier.arrive(empty.index(slot), count=1)
        k2 = _short_keys(k2_ptr, next_b, next_kv, next_i, tokens, next_end, kv_heads, window2, NI, NH, W, D)

        # The rows of one (i, h) differ in k alone: weigh them against each other, multiply by v2[k] and sum.
        k = i_row - window2 + 1 + r % W
        valid = (k >= 0) & (r % W < window2)
        if FAST:
            sum_G = gl.sum(gl.where(valid, 1.0, 0.0).reshape([G, W]) * total.reshape([G, W]), 1)
            lse = log2(sum_G)
        else:
            m_GW = gl.where(valid, m, -float("inf")).reshape([G, W])
            top_G = gl.max(m_GW, 1)
            weight_GW = gl.exp2(m_GW - gl.expand_dims(top_G, 1))
            sum_G = gl.sum(weight_GW * total.reshape([G, W]), 1)
            lse = top_G + gl.log2(sum_G)
            weight = gl.convert_layout(weight_GW.reshape([ROWS]), gl.SliceLayout(1, OUT))
            o = o * gl.expand_dims(weight, 1)
        there = i + g // NH < tokens
        lse = gl.convert_layout(lse, LG)
        lse_at = lse_ptr + _times(b * heads + head + g % NH, tokens) + i + g // NH
        gl.store(lse_at, lse * 0.6931471805599453, mask=there)
        if FAST:  # a NaN is not within the limit either
            bad = gl.where(there & ~(gl.abs(lse) < LIMIT), 1, bad)
        # Rows without a short key have finite sums, and zeros for v2.
        o_GD = gl.sum((o * _widened(v2)).reshape([G, W, D]), 1)
        SUMS: gl.constexpr = o_GD.type.layout
        o_GD = o_GD * gl.expand_dims(gl.convert_layout(inverse(sum_G), gl.SliceLayout(1, SUMS)), 1)
        _store(o_ptr, o_GD, b, head, i, tokens, heads, NH, SUMS)

        before = row
        row, b, kv_head, block, first_i = next_row, next_b, next_kv, next_block, next_first
        i, head = next_i, next_head
    return gl.max(bad, 0)


@gluon.jit
def _consume(
    GROUP: gl.constexpr, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, flags, agreed, u_buffers,
    full, empty, k_buffers, v_buffers, first, last, row, rows,
    units_i, heads, kv_heads, tokens, window1, window2, scale,
    HB: gl.constexpr, NI: gl.constexpr, NH: gl.constexpr, WGI: gl.constexpr, WGH: gl.constexpr, W: gl.constexpr,
    TILES: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    bad = _rows(
        GROUP, LIMIT > 0, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, u_buffers, full, empty, k_buffers, v_buffers,
        first, last, row, gl.to_tensor(0), units_i, heads, kv_heads, tokens, window1, window2, scale,
        HB, NI, NH, WGI, WGH, W, TILES, LIMIT,
    )  # fmt: skip
    if LIMIT > 0:  # noqa: SIM102
        if agree(GROUP, bad, flags, agreed):
            _rows(
                GROUP, False, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, u_buffers, full, empty, k_buffers, v_buffers,
                first, last, row, rows, units_i, heads, kv_heads, tokens, window1, window2, scale,
                HB, NI, NH, WGI, WGH, W, TILES, LIMIT,
            )  # fmt: skip


@gluon.jit
def resident_forward(
    q_ptr, k2_ptr, v2_ptr, k1_desc, v1_desc, o_ptr, lse_ptr, flags,
    units, each, units_i, heads, kv_heads, tokens, window1, window2, scale,
    HB: gl.constexpr, NI: gl.constexpr, NH: gl.constexpr, WGI: gl.constexpr, WGH: gl.constexpr, W: gl.constexpr,
    TILES: gl.constexpr, LIMIT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `hopper_forward.forward`, of T <= TILES * N tokens; a program does `each` units in their order.

    A unit is HB-th part of the query heads of a key/value head, for NI + WGI queries.
    """
    N: gl.constexpr = k1_desc.block_type.shape[1]
    D: gl.constexpr = k1_desc.block_type.shape[2]
    ROWS: gl.constexpr = NI * NH * W
    k_buffers = gl.allocate_shared_memory(k1_desc.dtype, [SLOTS * TILES, 1, N, D], k1_desc.layout)
    v_buffers = gl.allocate_shared_memory(v1_desc.dtype, [SLOTS * TILES, 1, N, D], v1_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    u_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], k1_desc.dtype)
    u_buffers = gl.allocate_shared_memory(k1_desc.dtype, [2, ROWS, D], u_layout)
    agreed = agreement()
    flags += 2 * gl.program_id(0)
    first = gl.program_id(0) * each
    last = gl.minimum(first + each, units)
    row = first // (HB * units_i)
    rows = (last - 1) // (HB * units_i) - row + 1
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    gl.constexpr(0), q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, flags, agreed, u_buffers,
                    full, empty, k_buffers, v_buffers, first, last, row, rows,
                    units_i, heads, kv_heads, tokens, window1, window2, scale, HB, NI, NH, WGI, WGH, W, TILES, LIMIT,
                ),
            ),
            (
                _consume,
                (
                    gl.constexpr(1), q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, flags, agreed, u_buffers,
                    full, empty, k_buffers, v_buffers, first, last, row, rows,
                    units_i, heads, kv_heads, tokens, window1, window2, scale, HB, NI, NH, WGI, WGH, W, TILES, LIMIT,
                ),
            ),
            (
                _produce,
                (
                    k1_desc, v1_desc, full, empty, k_buffers, v_buffers, flags, agreed, row, rows, kv_heads,
                    TILES, LIMIT,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
