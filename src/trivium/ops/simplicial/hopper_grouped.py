"""2-simplicial attention of groups of query heads for Hopper, in Gluon: warp-specialised, persistent, one pipeline.

A step is 128 rows (head, short key) of one query, 64 a warpgroup; its columns are keys of the long window, of which
only the first tile can hold some to mask. The keys are those of a whole sequence, or with RINGS slots of ring buffers,
of whose batch rows each has one query: the newest token. Two warpgroups share the tiles of keys and values that two
warps bring by TMA, and the copy engine fills in zeros before the first.

The steps of a program are one pipeline: the first logits of the next step are computed beside the last product with
values of this one, and their exponentials before this step's results are gathered and written.

As in `hopper_forward`, a program does without a running maximum first, and all again where that had not the range.
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

from trivium.ops.simplicial.hopper_forward import (
    agree,
    agreement,
    bring,
    masked,
    ring,
    rows_layout,
    told,
    weigh,
)

ROWS = gl.constexpr(64)  # rows of one warpgroup's tile


@gluon.jit
def _place(lengths, step, HB, kv_heads, tokens, window1, N: gl.constexpr, RINGS: gl.constexpr):
    """Return (b, kv head, head block, at, tiles, first key) of a step; `at` is the query, or a ring's row's length.

    The tiles end at the query's own key, or at the last slot in use.
    """
    if RINGS:
        unit = step // HB
        row = unit
        at = gl.load(lengths + unit // kv_heads).to(gl.int32)
        end = gl.maximum(gl.minimum(at, tokens), 1)
        tiles = (end + N - 1) // N
    else:
        unit = gl.program_id(0) + (step // HB) * gl.num_programs(0)
        row = unit // tokens
        at = tokens - 1 - unit % tokens
        end = at + 1
        tiles = (gl.minimum(end, window1) + N - 1) // N
    return row // kv_heads, row % kv_heads, step % HB, at, tiles, end - tiles * N


@gluon.jit
def _produce(
    desc, full, empty, buffers, flags, agreed,
    lengths, first, last, HB, kv_heads, tokens, window1, RINGS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    count = _bring(
        desc, full, empty, buffers, gl.to_tensor(0), lengths, first, last, HB, kv_heads, tokens, window1, RINGS
    )
    if LIMIT > 0:  # noqa: SIM102 - known when compiling
        if told(flags, agreed):
            _bring(desc, full, empty, buffers, count, lengths, first, last, HB, kv_heads, tokens, window1, RINGS)


@gluon.jit
def _bring(
    desc, full, empty, buffers, count, lengths, first, last, HB, kv_heads, tokens, window1, RINGS: gl.constexpr
):  # fmt: skip
    """Copy the tiles of all steps into the ring, of which `count` were brought before; return the new count."""
    N: gl.constexpr = desc.block_type.shape[1]
    for step in range(first, last):
        b, kv_head, _, _, tiles, start = _place(lengths, step, HB, kv_heads, tokens, window1, N, RINGS)
        count = bring(desc, full, empty, buffers, count, b, kv_head, tiles, start)
    return count


@gluon.jit
def _short(
    ptr, b, kv_head, at, tokens, window2, kv_heads, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr,
    RINGS: gl.constexpr,
):  # fmt: skip
    """Return k2 or v2 (1, W, D) of a query's short window or ring; 0 where there is no key."""
    L: gl.constexpr = rows_layout(NH, W, D)
    w = gl.expand_dims(gl.expand_dims(gl.arange(0, W, gl.SliceLayout(0, gl.SliceLayout(2, L))), 0), 2)
    d = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    row = ((b * window2 + w) if RINGS else (b * tokens + at - window2 + 1 + w)).to(gl.int64)
    there = _there(w, at, window2, RINGS)
    return gl.load(ptr + (row * kv_heads + kv_head) * D + d, mask=there & (d >= 0), other=0.0)


@gluon.jit
def _there(w, at, window2, RINGS: gl.constexpr):
    """Return whether there is a short key number w."""
    return w < gl.minimum(at, window2) if RINGS else (w < window2) & (w >= window2 - 1 - at)


@gluon.jit
def _queries(
    ptr, b, at, head, tokens, heads, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr, RINGS: gl.constexpr
):  # fmt: skip
    """Return q (NH, 1, D) of the heads head.."""
    L: gl.constexpr = rows_layout(NH, W, D)
    g = gl.expand_dims(gl.expand_dims(gl.arange(0, NH, gl.SliceLayout(1, gl.SliceLayout(2, L))), 1), 2)
    d = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    row = b if RINGS else b * tokens + at
    return gl.load(ptr + (row.to(gl.int64) * heads + head + g) * D + d)


@gluon.jit
def _low(at, window1, RINGS: gl.constexpr):
    """Return the first key that may be read."""
    return 0 if RINGS else gl.maximum(at - window1 + 1, 0)


@gluon.jit
def _attend(
    GROUP: gl.constexpr, FAST: gl.constexpr, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, lengths, u_buffers,
    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, count,
    first, last, HB, heads, kv_heads, tokens, window1, window2, scale,
    NH: gl.constexpr, W: gl.constexpr, RINGS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Do the steps first..last of this warpgroup's rows as one pipeline; `count` tiles were read before.

    Return the new count, and whether a log-sum-exp is past LIMIT.
    """
    K_STAGES: gl.constexpr = k_buffers.type.shape[0]
    V_STAGES: gl.constexpr = v_buffers.type.shape[0]
    N: gl.constexpr = k_buffers.type.shape[2]
    D: gl.constexpr = k_buffers.type.shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    LS: gl.constexpr = gl.SliceLayout(1, S)
    LO: gl.constexpr = gl.SliceLayout(1, OUT)
    L: gl.constexpr = rows_layout(NH, W, D)
    LG: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, L))
    SMALLEST: gl.constexpr = 2.0**-LIMIT
    group = heads // kv_heads
    for slot in gl.static_range(2):
        step = gl.minimum(first + slot, last - 1)
        b, kv_head, block, at, _, _ = _place(lengths, step, HB, kv_heads, tokens, window1, N, RINGS)
        q = _queries(q_ptr, b, at, kv_head * group + block * (2 * NH) + GROUP * NH, tokens, heads, NH, W, D, RINGS)
        k2 = _short(k2_ptr, b, kv_head, at, tokens, window2, kv_heads, NH, W, D, RINGS)
        u = (q.to(gl.float32) * scale) * k2.to(gl.float32)
        u_buffers.index(2 * slot + GROUP).store(u.to(k_buffers.dtype).reshape([ROWS, D]))
    fence_async_shared()
    nothing = gl.zeros([ROWS, N], gl.float32, S)
    row_out = gl.arange(0, ROWS, LO)
    bad = gl.zeros([ROWS], gl.int32, LO)
    row = gl.arange(0, ROWS, LS)
    never = gl.full([ROWS], -float("inf"), gl.float32, LS)
    none = gl.zeros([ROWS], gl.float32, LS)

    b, kv_head, block, at, tiles, start = _place(lengths, first, HB, kv_heads, tokens, window1, N, RINGS)
    head = kv_head * group + block * (2 * NH) + GROUP * NH
    next_step = gl.minimum(first + 1, last - 1)
    n_b, n_kv, n_block, n_at, n_tiles, n_start = _place(
        lengths, next_step, HB, kv_heads, tokens, window1, N, RINGS
    )  # fmt: skip
    n_head = n_kv * group + n_block * (2 * NH) + GROUP * NH
    stage = count % K_STAGES
    mbarrier.wait(k_full.index(stage), count // K_STAGES & 1)
    k_tile = k_buffers.index(stage).reshape([N, D]).permute([1, 0])
    s_now = warpgroup_mma(u_buffers.index(GROUP), k_tile, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_now])
    mbarrier.arrive(k_empty.index(stage), count=1)
    p, m, total, _ = weigh(masked(s, start, _low(at, window1, RINGS), row, 0, 1, S), never, none, FAST, False)
    p16 = gl.convert_layout(p.to(k_buffers.dtype), P)
    mbarrier.wait(
        k_full.index((count + 1) % K_STAGES), (count + 1) // K_STAGES & 1, pred=(tiles > 1) | (first + 1 < last)
    )  # fmt: skip
    for step in range(first, last):
        parity = (step - first) % 2
        mine = u_buffers.index(parity * 2 + GROUP)
        other = u_buffers.index((1 - parity) * 2 + GROUP)
        more = step + 1 < last
        # The queries after the next ones: they come from device memory.
        then = gl.minimum(step + 2, last - 1)
        t_b, t_kv, t_block, t_at, t_tiles, t_start = _place(
            lengths, then, HB, kv_heads, tokens, window1, N, RINGS
        )  # fmt: skip
        t_head = t_kv * group + t_block * (2 * NH) + GROUP * NH
        q = _queries(q_ptr, t_b, t_at, t_head, tokens, heads, NH, W, D, RINGS)
        o = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, OUT))
        for tile in range(1, tiles):
            now = count + tile
            stage = now % K_STAGES
            k_tile = k_buffers.index(stage).reshape([N, D]).permute([1, 0])
            s_now = warpgroup_mma(mine, k_tile, nothing, use_acc=False, is_async=True)
            v_stage = (now - 1) % V_STAGES
            mbarrier.wait(v_full.index(v_stage), (now - 1) // V_STAGES & 1)
            o = warpgroup_mma(p16, v_buffers.index(v_stage).reshape([N, D]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_now])
            mbarrier.arrive(k_empty.index(stage), count=1)
            p, m, total, alpha = weigh(s, m, total, FAST, False)
            # As in the forward kernel, this branch keeps the wait for the product behind the exponentials.
            mbarrier.wait(
                k_full.index((now + 1) % K_STAGES), (now + 1) // K_STAGES & 1, pred=(tile + 1 < tiles) | more
            )  # fmt: skip
            o_now, p16, p = warpgroup_mma_wait(0, deps=[o, p16, p])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            if not FAST:
                o_now = o_now * gl.expand_dims(gl.convert_layout(alpha, LO), 1)
            o = warpgroup_mma_init(o_now)
            p16 = gl.convert_layout(p.to(k_buffers.dtype), P)

        # The next step's first logits beside this step's last product. After the last step they are of no use.
        count += tiles
        stage = count % K_STAGES
        k_tile = k_buffers.index(stage).reshape([N, D]).permute([1, 0])
        s_now = warpgroup_mma(other, k_tile, nothing, use_acc=False, is_async=True)
        v_stage = (count - 1) % V_STAGES
        mbarrier.wait(v_full.index(v_stage), (count - 1) // V_STAGES & 1)
        o = warpgroup_mma(p16, v_buffers.index(v_stage).reshape([N, D]), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_now])
        mbarrier.arrive(k_empty.index(stage), count=1, pred=more)
        p, n_m, n_total, _ = weigh(
            masked(s, n_start, _low(n_at, window1, RINGS), row, 0, 1, S), never, none, FAST, False
        )
        mbarrier.wait(
            k_full.index((count + 1) % K_STAGES), (count + 1) // K_STAGES & 1,
            pred=((n_tiles > 1) & more) | (step + 2 < last),
        )  # fmt: skip
        o_now, p16, p = warpgroup_mma_wait(0, deps=[o, p16, p])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        p16 = gl.convert_layout(p.to(k_buffers.dtype), P)
        v2 = _short(v2_ptr, b, kv_head, at, tokens, window2, kv_heads, NH, W, D, RINGS)
        k2 = _short(k2_ptr, t_b, t_kv, t_at, tokens, window2, kv_heads, NH, W, D, RINGS)

        # The rows of one head differ in their short slot alone: weigh them, multiply by v2 and sum.
        valid = _there(row % W, at, window2, RINGS)
        if FAST:
            weight_GW = gl.where(valid, 1.0, 0.0).reshape([NH, W])
        else:
            m_GW = gl.where(valid, m, -float("inf")).reshape([NH, W])
            top_G = gl.max(m_GW, 1)
            top_G = gl.where(top_G == -float("inf"), 0.0, top_G)
            weight_GW = gl.exp2(m_GW - gl.expand_dims(top_G, 1))
        sum_G = gl.sum(weight_GW * total.reshape([NH, W]), 1)
        if not FAST:
            sum_G = gl.where(sum_G > 0, sum_G, 1.0)
        share_GW = weight_GW / gl.expand_dims(sum_G, 1)
        share = gl.convert_layout(share_GW.reshape([ROWS]), LO)
        if FAST:  # a NaN is in no range
            within = (share > SMALLEST) & (share < 1 / SMALLEST)
            bad = gl.where(_there(row_out % W, at, window2, RINGS) & ~within, 1, bad)
        mine.store((o_now * gl.expand_dims(share, 1)).to(k_buffers.dtype))
        read = mine.reshape([NH, W, D]).load(L)
        o_GD = gl.sum(read.to(gl.float32) * v2.to(gl.float32), 1)
        g = gl.arange(0, NH, LG)
        d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L)))
        if RINGS:
            o_GD = gl.where(at > 0, o_GD, 0.0)
            o_row = (b * heads + head + g).to(gl.int64)
        else:
            lse = gl.log2(sum_G) if FAST else top_G + gl.log2(sum_G)
            lse = gl.convert_layout(lse * 0.6931471805599453, LG)
            gl.store(lse_ptr + (b * heads + head + g).to(gl.int64) * tokens + at, lse)
            o_row = (b * tokens + at).to(gl.int64) * heads + head + g
        gl.store(o_ptr + gl.expand_dims(o_row, 1) * D + gl.expand_dims(d, 0), o_GD.to(o_ptr.dtype.element_ty))
        mine.store(((q.to(gl.float32) * scale) * k2.to(gl.float32)).to(k_buffers.dtype).reshape([ROWS, D]))
        fence_async_shared()

        m, total = n_m, n_total
        b, kv_head, head, at, tiles, start = n_b, n_kv, n_head, n_at, n_tiles, n_start
        n_b, n_kv, n_head, n_at, n_tiles, n_start = t_b, t_kv, t_head, t_at, t_tiles, t_start
    return count, gl.max(bad, 0)


@gluon.jit
def _consume(
    GROUP: gl.constexpr, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, lengths, flags, agreed, u_buffers,
    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
    first, last, HB, heads, kv_heads, tokens, window1, window2, scale,
    NH: gl.constexpr, W: gl.constexpr, RINGS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    count, bad = _attend(
        GROUP, LIMIT > 0, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, lengths, u_buffers,
        k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, gl.to_tensor(0),
        first, last, HB, heads, kv_heads, tokens, window1, window2, scale, NH, W, RINGS, LIMIT,
    )  # fmt: skip
    if LIMIT > 0:  # noqa: SIM102 - known when compiling
        if agree(GROUP, bad, flags, agreed):
            _attend(
                GROUP, False, q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, lengths, u_buffers,
                k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, count,
                first, last, HB, heads, kv_heads, tokens, window1, window2, scale, NH, W, RINGS, LIMIT,
            )  # fmt: skip


@gluon.jit
def grouped(
    q_ptr, k2_ptr, v2_ptr, k1_desc, v1_desc, o_ptr, lse_ptr, lengths, flags,
    count, each, HB, heads, kv_heads, tokens, window1, window2, scale,
    NH: gl.constexpr, W: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, RINGS: gl.constexpr,
    LIMIT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write o (B, T, Hq, D) and its natural log-sum-exp (B, Hq, T); with RINGS o (B, 1, Hq, D) alone.

    Without RINGS `count` units (batch row, key/value head, query) are dealt to the programs in turn. With RINGS it
    counts steps, of which a program does `each`; `tokens` and `window2` are the slots of the rings, and `lengths` (B,)
    is read, which is not otherwise. `scale` holds log2(e). `flags` has two numbers a program. Log-sum-exps (in powers
    of two) past LIMIT ask for the online softmax, which a LIMIT of 0 takes at once.
    """
    D: gl.constexpr = k1_desc.block_type.shape[2]
    k_buffers, k_full, k_empty = ring(k1_desc, K_STAGES)
    v_buffers, v_full, v_empty = ring(v1_desc, V_STAGES)
    u_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], k1_desc.dtype)
    u_buffers = gl.allocate_shared_memory(k1_desc.dtype, [4, ROWS, D], u_layout)
    agreed = agreement()
    flags += 2 * gl.program_id(0)
    if RINGS:
        first = gl.program_id(0) * each
        last = gl.minimum(first + each, count)
    else:
        first = gl.program_id(0) * 0
        last = (count - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * HB
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    gl.constexpr(0), q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, lengths, flags, agreed, u_buffers,
                    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
                    first, last, HB, heads, kv_heads, tokens, window1, window2, scale, NH, W, RINGS, LIMIT,
                ),
            ),
            (
                _consume,
                (
                    gl.constexpr(1), q_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr, lengths, flags, agreed, u_buffers,
                    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
                    first, last, HB, heads, kv_heads, tokens, window1, window2, scale, NH, W, RINGS, LIMIT,
                ),
            ),
            (
                _produce,
                (
                    k1_desc, k_full, k_empty, k_buffers, flags, agreed,
                    lengths, first, last, HB, kv_heads, tokens, window1, RINGS, LIMIT,
                ),
            ),
            (
                _produce,
                (
                    v1_desc, v_full, v_empty, v_buffers, flags, agreed,
                    lengths, first, last, HB, kv_heads, tokens, window1, RINGS, LIMIT,
                ),
            ),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip
