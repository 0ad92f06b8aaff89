"""Forward of trilinear 2-simplicial attention for Hopper, in Gluon: warp-specialised FlashAttention of virtual queries.

Rows of a tile are (query i, head, short key k) with u = scale * q[i,h] * k2[k], its columns keys of the long window.
Two warpgroups hold 64 or 128 rows each and share the K1 and V1 tiles that two warps bring by TMA. A row's result is
multiplied by v2[k] and summed over the short window of its (i, h) at the end. docs/kernels.md draws a tile.

A program first does its tiles without a running maximum: bfloat16 weights and float32 sums have the range for ordinary
logits. Where a query's log-sum-exp shows that they had not, both warpgroups agree to do all tiles of the program again,
by the online softmax. There are two variants of the loop, not more: see docs/kernels.md.
"""

# Gluon functions are typed for its compiler: their layouts and blocks are compile-time values.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from trivium.ops.simplicial.hopper_tiles import (
    agree,
    agreement,
    bring,
    inverse,
    log2,
    masked,
    ring,
    row_sums,
    rows_layout,
    told,
    weigh,
)


@gluon.jit
def _place(step, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NIC: gl.constexpr, N: gl.constexpr):
    """Return (b, kv head, head block, first i, tiles, first key) of this program's tile number `step`."""
    unit = gl.program_id(0) + (step // HB) * gl.num_programs(0)
    row = ((unit.to(gl.int64) * by_i) >> shift).to(gl.int32)  # unit // units_i
    b = ((row.to(gl.int64) * by_kv) >> shift).to(gl.int32)  # row // kv_heads
    at = unit - row * units_i
    # Late queries read more keys. A program's units may lie at two places of a row in turn: every other row runs back.
    first_i = gl.where(row % 2 == 0, units_i - 1 - at, at) * NIC
    last_i = gl.minimum(first_i + NIC, tokens) - 1
    low = gl.maximum(first_i - window1 + 1, 0)
    tiles = (last_i - low + N) // N
    return b, row - b * kv_heads, step % HB, first_i, tiles, last_i + 1 - tiles * N


@gluon.jit
def _produce(
    desc, full, empty, buffers, flags, agreed,
    steps, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NIC: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    count = _bring(
        desc, full, empty, buffers, gl.to_tensor(0),
        steps, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NIC,
    )  # fmt: skip
    if LIMIT > 0:  # noqa: SIM102 - known when compiling
        if told(flags, agreed):
            _bring(
                desc, full, empty, buffers, count,
                steps, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NIC,
            )  # fmt: skip


@gluon.jit
def _bring(
    desc, full, empty, buffers, count,
    steps, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NIC: gl.constexpr,
):  # fmt: skip
    """Copy the tiles of all steps into the ring, of which `count` were brought before; return the new count."""
    N: gl.constexpr = desc.block_type.shape[1]
    for step in range(steps):
        b, kv_head, _, _, tiles, start = _place(
            step, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NIC, N
        )  # fmt: skip
        count = bring(desc, full, empty, buffers, count, b, kv_head, tiles, start)
    return count


@gluon.jit
def _short(
    ptr, b, kv_head, i, tokens, kv_heads, window2,
    NI: gl.constexpr, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Return k2 or v2 (G or 1, W, D) of the short windows of the queries i..; 0 where there is no key."""
    L: gl.constexpr = rows_layout(NI * NH, W, D)
    w = gl.expand_dims(gl.expand_dims(gl.arange(0, W, gl.SliceLayout(0, gl.SliceLayout(2, L))), 0), 2)
    d = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    if NI == 1:
        k = i - window2 + 1 + w
    else:
        g = gl.expand_dims(gl.expand_dims(gl.arange(0, NI * NH, gl.SliceLayout(1, gl.SliceLayout(2, L))), 1), 2)
        k = i + g // NH - window2 + 1 + w
    row = ((b * tokens + k).to(gl.int64) * kv_heads + kv_head) * D
    return gl.load(ptr + row + d, mask=(k >= 0) & (w < window2) & (k < tokens) & (d >= 0), other=0.0)


@gluon.jit
def _queries(ptr, b, head, i, tokens, heads, NI: gl.constexpr, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr):
    """Return q (G, 1, D) of the queries i.. and heads head..; 0 past the end."""
    L: gl.constexpr = rows_layout(NI * NH, W, D)
    g = gl.expand_dims(gl.expand_dims(gl.arange(0, NI * NH, gl.SliceLayout(1, gl.SliceLayout(2, L))), 1), 2)
    d = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    row = ((b * tokens + i + g // NH).to(gl.int64) * heads + head + g % NH) * D
    return gl.load(ptr + row + d, mask=(i + g // NH < tokens) & (d >= 0), other=0.0)


@gluon.jit
def _after(stage, phase, STAGES: gl.constexpr):
    """Return the buffer after this one, and its barriers' phase."""
    last = stage + 1 == STAGES
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _attend(
    u, k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, stage, phase,
    tiles, start, low, clear, i, i_row, window1, FAST: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """Return (o, m, l) of the tile's rows over `tiles` key tiles from key `start`, and the next stage and phase.

    o is not divided by l. All rows read the keys from `clear` to i.
    """
    STAGES: gl.constexpr = k_buffers.type.shape[0]
    N: gl.constexpr = k_buffers.type.shape[2]
    D: gl.constexpr = k_buffers.type.shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    LS: gl.constexpr = gl.SliceLayout(1, S)
    LO: gl.constexpr = gl.SliceLayout(1, OUT)
    # Narrow tiles have few exponentials beside each shuffle of a sum. Wide ones have no registers for partial sums.
    PARTIAL: gl.constexpr = FAST and N < 128
    ROWS: gl.constexpr = u.shape[0]
    nothing = gl.zeros([ROWS, N], gl.float32, S)
    o = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, OUT))
    m = gl.full([ROWS], -float("inf"), gl.float32, LS)
    total = row_sums(nothing, PARTIAL)

    mbarrier.wait(k_full.index(stage), phase)
    k_tile = k_buffers.index(stage).reshape([N, D]).permute([1, 0])
    s_now = warpgroup_mma(u, k_tile, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_now])
    mbarrier.arrive(k_empty.index(stage), count=1)
    s = masked(s, start, low, i_row, window1, 2 if MANY else 1, S)
    p, m, total, _ = weigh(s, m, total, FAST, PARTIAL)
    p16 = gl.convert_layout(p.to(k_buffers.dtype), P)
    v_stage, v_phase = stage, phase
    stage, phase = _after(stage, phase, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=tiles > 1)
    for tile in range(1, tiles):
        k_tile = k_buffers.index(stage).reshape([N, D]).permute([1, 0])
        s_now = warpgroup_mma(u, k_tile, nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        o = warpgroup_mma(p16, v_buffers.index(v_stage).reshape([N, D]), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_now])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if MANY:
            first = start + tile * N
            if (first < clear) | (first + N > i + 1):
                s = masked(s, first, low, i_row, window1, 2, S)
        # Beside the exponentials the product of the last p and v1 runs. The branch of this wait for the next keys
        # also keeps the compiler from moving the wait for that product before the exponentials.
        p, m, total, alpha = weigh(s, m, total, FAST, PARTIAL)
        next_stage, next_phase = _after(stage, phase, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=tile + 1 < tiles)
        o_now, p16, p = warpgroup_mma_wait(0, deps=[o, p16, p])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        if not FAST:
            o_now = o_now * gl.expand_dims(gl.convert_layout(alpha, LO), 1)
        o = warpgroup_mma_init(o_now)
        p16 = gl.convert_layout(p.to(k_buffers.dtype), P)
        v_stage, v_phase = stage, phase
        stage, phase = next_stage, next_phase
    mbarrier.wait(v_full.index(v_stage), v_phase)
    o = warpgroup_mma(p16, v_buffers.index(v_stage).reshape([N, D]), o, is_async=True)
    o_now, p16 = warpgroup_mma_wait(0, deps=[o, p16])
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    if PARTIAL:
        total = gl.convert_layout(gl.sum(total, 1), LS)
    return o_now, m, total, stage, phase


@gluon.jit
def _consume(
    GROUP: gl.constexpr, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, flags, agreed, u_buffers,
    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
    steps, HB, units_i, heads, kv_heads, shift, by_i, by_kv, tokens, window1, window2, scale,
    NI: gl.constexpr, NH: gl.constexpr, WGI: gl.constexpr, WGH: gl.constexpr, W: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    stage, phase, bad = _rows(
        GROUP, LIMIT > 0, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, u_buffers,
        k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, gl.to_tensor(0), gl.to_tensor(0),
        steps, HB, units_i, heads, kv_heads, shift, by_i, by_kv, tokens,
        window1, window2, scale, NI, NH, WGI, WGH, W, LIMIT,
    )  # fmt: skip
    if LIMIT > 0:  # noqa: SIM102
        if agree(GROUP, bad, flags, agreed):
            _rows(
                GROUP, False, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, u_buffers,
                k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, stage, phase,
                steps, HB, units_i, heads, kv_heads, shift, by_i, by_kv, tokens,
                window1, window2, scale, NI, NH, WGI, WGH, W, LIMIT,
            )  # fmt: skip


@gluon.jit
def _rows(
    GROUP: gl.constexpr, FAST: gl.constexpr, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, u_buffers,
    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, stage, phase,
    steps, HB, units_i, heads, kv_heads, shift, by_i, by_kv, tokens, window1, window2, scale,
    NI: gl.constexpr, NH: gl.constexpr, WGI: gl.constexpr, WGH: gl.constexpr, W: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Do this warpgroup's rows of all steps; return the next stage, its phase, and if a log-sum-exp is past LIMIT."""
    N: gl.constexpr = k_buffers.type.shape[2]
    D: gl.constexpr = k_buffers.type.shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    G: gl.constexpr = NI * NH
    ROWS: gl.constexpr = G * W
    L: gl.constexpr = rows_layout(G, W, D)
    MANY: gl.constexpr = NI + WGI > 1
    LG: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, L))
    g = gl.arange(0, G, LG)
    bad = gl.zeros([G], gl.int32, LG)
    buffer = u_buffers.index(GROUP)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, S))
    group = heads // kv_heads
    b, kv_head, head_block, first_i, tiles, start = _place(
        0, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NI + WGI, N
    )
    i = first_i + GROUP * WGI
    head = kv_head * group + head_block * (NH + WGH) + GROUP * WGH
    q = _queries(q_ptr, b, head, i, tokens, heads, NI, NH, W, D)
    k2 = _short(k2_ptr, b, kv_head, i, tokens, kv_heads, window2, NI, NH, W, D)
    for step in range(steps):
        u = (q.to(gl.float32) * scale) * k2.to(gl.float32)
        buffer.store(u.to(k_buffers.dtype).reshape([ROWS, D]))
        fence_async_shared()
        i_row = i + row // (NH * W)
        low = gl.maximum(i - window1 + 1, 0)
        # The next queries come from device memory: fetch them now. Short keys and values wait in the caches.
        next_b, next_kv_head, next_block, next_first, next_tiles, next_start = _place(
            gl.minimum(step + 1, steps - 1), HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NI + WGI, N
        )
        next_i = next_first + GROUP * WGI
        next_head = next_kv_head * group + next_block * (NH + WGH) + GROUP * WGH
        q = _queries(q_ptr, next_b, next_head, next_i, tokens, heads, NI, NH, W, D)
        o, m, total, stage, phase = _attend(
            buffer, k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, stage, phase,
            tiles, start, low, i + NI - window1, i, i_row, window1, FAST, MANY,
        )  # fmt: skip
        v2 = _short(v2_ptr, b, kv_head, i, tokens, kv_heads, window2, NI, NH, W, D)
        k2 = _short(k2_ptr, next_b, next_kv_head, next_i, tokens, kv_heads, window2, NI, NH, W, D)

        # The rows of one (i, h) differ in k alone: weigh them against each other, multiply by v2[k] and sum.
        k = i_row - window2 + 1 + row % W
        valid = (k >= 0) & (row % W < window2)
        if FAST:
            weight_GW = gl.where(valid, 1.0, 0.0).reshape([G, W])
            sum_G = gl.sum(weight_GW * total.reshape([G, W]), 1)
            share_GW = weight_GW * gl.expand_dims(inverse(sum_G), 1)
            lse = log2(sum_G)
        else:
            m_GW = gl.where(valid, m, -float("inf")).reshape([G, W])
            top_G = gl.max(m_GW, 1)
            weight_GW = gl.exp2(m_GW - gl.expand_dims(top_G, 1))
            sum_G = gl.sum(weight_GW * total.reshape([G, W]), 1)
            share_GW = weight_GW / gl.expand_dims(sum_G, 1)
            lse = top_G + gl.log2(sum_G)
        share = gl.convert_layout(share_GW.reshape([ROWS]), gl.SliceLayout(1, OUT))
        buffer.store((o * gl.expand_dims(share, 1)).to(k_buffers.dtype))
        there = i + g // NH < tokens
        lse = gl.convert_layout(lse, LG)
        lse_at = lse_ptr + (b * heads + head + g % NH).to(gl.int64) * tokens + i + g // NH
        gl.store(lse_at, lse * 0.6931471805599453, mask=there)
        if FAST:  # a NaN is not within the limit either
            bad = gl.where(there & ~(gl.abs(lse) < LIMIT), 1, bad)
        read = buffer.reshape([G, W, D]).load(L)
        o_GD = gl.sum(read.to(gl.float32) * v2.to(gl.float32), 1)
        d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L)))
        o_row = (b * tokens + i + g // NH).to(gl.int64) * heads + head + g % NH
        gl.store(
            o_ptr + gl.expand_dims(o_row, 1) * D + gl.expand_dims(d, 0),
            o_GD.to(o_ptr.dtype.element_ty),
            mask=gl.expand_dims(there, 1) & (gl.expand_dims(d, 0) >= 0),
        )

        b, kv_head, i, head, tiles, start = next_b, next_kv_head, next_i, next_head, next_tiles, next_start
    return stage, phase, gl.max(bad, 0)


@gluon.jit
def forward(
    q_ptr, k2_ptr, v2_ptr, k1_desc, v1_desc, o_ptr, lse_ptr, flags,
    units, HB, units_i, heads, kv_heads, shift, by_i, by_kv, tokens, window1, window2, scale,
    NI: gl.constexpr, NH: gl.constexpr, WGI: gl.constexpr, WGH: gl.constexpr, W: gl.constexpr,
    STAGES: gl.constexpr, LIMIT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write o (B, T, Hq, D) and the natural log-sum-exp (B, Hq, T); `scale` holds log2(e).

    `flags` has two numbers a program. Log-sum-exps (in powers of two) past LIMIT ask for the online softmax, which a
    LIMIT of 0 takes at once.
    """
    D: gl.constexpr = k1_desc.block_type.shape[2]
    k_buffers, k_full, k_empty = ring(k1_desc, STAGES)
    v_buffers, v_full, v_empty = ring(v1_desc, STAGES)
    ROWS: gl.constexpr = NI * NH * W
    u_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], k1_desc.dtype)
    u_buffers = gl.allocate_shared_memory(k1_desc.dtype, [2, ROWS, D], u_layout)
    agreed = agreement()
    flags += 2 * gl.program_id(0)
    mine = (units - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    steps = mine * HB
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    gl.constexpr(0), q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, flags, agreed, u_buffers,
                    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
                    steps, HB, units_i, heads, kv_heads, shift, by_i, by_kv, tokens, window1, window2, scale,
                    NI, NH, WGI, WGH, W, LIMIT,
                ),
            ),
            (
                _consume,
                (
                    gl.constexpr(1), q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, flags, agreed, u_buffers,
                    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
                    steps, HB, units_i, heads, kv_heads, shift, by_i, by_kv, tokens, window1, window2, scale,
                    NI, NH, WGI, WGH, W, LIMIT,
                ),
            ),
            (
                _produce,
                (
                    k1_desc, k_full, k_empty, k_buffers, flags, agreed,
                    steps, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NI + WGI, LIMIT,
                ),
            ),
            (
                _produce,
                (
                    v1_desc, v_full, v_empty, v_buffers, flags, agreed,
                    steps, HB, units_i, kv_heads, shift, by_i, by_kv, tokens, window1, NI + WGI, LIMIT,
                ),
            ),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip
