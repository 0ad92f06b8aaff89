"""One new token of 2-simplicial attention over ring buffers, for Hopper, in Gluon: warp-specialised, persistent.

A tile's rows are (head, slot of the short ring) of one batch row, 64 a warpgroup; its columns are slots of the long
ring up to the row's length, so that only a row's first tile can hold columns before slot 0, which the copy engine
fills with zeros. Two warpgroups share the tiles of keys and values that two warps bring by TMA.

The steps of a program are one pipeline: the first logits of the next step are computed beside the last product with
values of this one, and their exponentials before this step's results are gathered and written.

As in the forward kernel, a program does without a running maximum first, and all again where that had not the range.
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

from trivium.ops.simplicial.hopper_tiles import agree, agreement, bring, inverse, masked, ring, rows_layout, told, weigh

ROWS = gl.constexpr(64)  # rows of one warpgroup's tile


@gluon.jit
def _place(lengths, step, HB, kv_heads, slots1, N: gl.constexpr):
    """Return (b, kv head, head block, length, tiles, first slot) of a step; the tiles end at the last slot in use."""
    unit = step // HB
    b = unit // kv_heads
    length = gl.load(lengths + b).to(gl.int32)
    end = gl.maximum(gl.minimum(length, slots1), 1)
    tiles = (end + N - 1) // N
    return b, unit % kv_heads, step % HB, length, tiles, end - tiles * N


@gluon.jit
def _produce(
    desc, full, empty, buffers, flags, agreed, lengths, first, last, HB, kv_heads, slots1, LIMIT: gl.constexpr
):  # fmt: skip
    count = _bring(desc, full, empty, buffers, gl.to_tensor(0), lengths, first, last, HB, kv_heads, slots1)
    if LIMIT > 0:  # noqa: SIM102 - known when compiling
        if told(flags, agreed):
            _bring(desc, full, empty, buffers, count, lengths, first, last, HB, kv_heads, slots1)


@gluon.jit
def _bring(desc, full, empty, buffers, count, lengths, first, last, HB, kv_heads, slots1):
    """Copy the tiles of all steps into the ring, of which `count` were brought before; return the new count."""
    N: gl.constexpr = desc.block_type.shape[1]
    for step in range(first, last):
        b, kv_head, _, _, tiles, start = _place(lengths, step, HB, kv_heads, slots1, N)
        count = bring(desc, full, empty, buffers, count, b, kv_head, tiles, start)
    return count


@gluon.jit
def _ring(ptr, b, kv_head, length, slots, kv_heads, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr):
    """Return k2 or v2 (1, W, D) of a row's short ring; 0 where a slot is empty."""
    L: gl.constexpr = rows_layout(NH, W, D)
    w = gl.expand_dims(gl.expand_dims(gl.arange(0, W, gl.SliceLayout(0, gl.SliceLayout(2, L))), 0), 2)
    d = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    row = ((b * slots + w).to(gl.int64) * kv_heads + kv_head) * D
    return gl.load(ptr + row + d, mask=(w < gl.minimum(length, slots)) & (d >= 0), other=0.0)


@gluon.jit
def _queries(ptr, b, head, heads, NH: gl.constexpr, W: gl.constexpr, D: gl.constexpr):
    """Return q (NH, 1, D) of the heads head.."""
    L: gl.constexpr = rows_layout(NH, W, D)
    g = gl.expand_dims(gl.expand_dims(gl.arange(0, NH, gl.SliceLayout(1, gl.SliceLayout(2, L))), 1), 2)
    d = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    return gl.load(ptr + (b * heads + head + g).to(gl.int64) * D + d)


@gluon.jit
def _attend(
    GROUP: gl.constexpr, FAST: gl.constexpr, q_ptr, k2_ptr, v2_ptr, o_ptr, lengths, u_buffers,
    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, count,
    first, last, HB, heads, kv_heads, slots1, slots2, scale, NH: gl.constexpr, W: gl.constexpr, LIMIT: gl.constexpr,
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
    SMALLEST: gl.constexpr = 2.0**-LIMIT
    group = heads // kv_heads
    for slot in gl.static_range(2):
        step = gl.minimum(first + slot, last - 1)
        b, kv_head, block, length, _, _ = _place(lengths, step, HB, kv_heads, slots1, N)
        q = _queries(q_ptr, b, kv_head * group + block * (2 * NH) + GROUP * NH, heads, NH, W, D)
        k2 = _ring(k2_ptr, b, kv_head, length, slots2, kv_heads, NH, W, D)
        u = (q.to(gl.float32) * scale) * k2.to(gl.float32)
        u_buffers.index(2 * slot + GROUP).store(u.to(k_buffers.dtype).reshape([ROWS, D]))
    fence_async_shared()
    nothing = gl.zeros([ROWS, N], gl.float32, S)
    row_out = gl.arange(0, ROWS, LO)
    bad = gl.zeros([ROWS], gl.int32, LO)
    row = gl.arange(0, ROWS, LS)
    never = gl.full([ROWS], -float("inf"), gl.float32, LS)
    none = gl.zeros([ROWS], gl.float32, LS)

    b, kv_head, block, length, tiles, start = _place(lengths, first, HB, kv_heads, slots1, N)
    head = kv_head * group + block * (2 * NH) + GROUP * NH
    next_step = gl.minimum(first + 1, last - 1)
    n_b, n_kv, n_block, n_length, n_tiles, n_start = _place(lengths, next_step, HB, kv_heads, slots1, N)
    n_head = n_kv * group + n_block * (2 * NH) + GROUP * NH
    stage = count % K_STAGES
    mbarrier.wait(k_full.index(stage), count // K_STAGES & 1)
    k_tile = k_buffers.index(stage).reshape([N, D]).permute([1, 0])
    s_now = warpgroup_mma(u_buffers.index(GROUP), k_tile, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_now])
    mbarrier.arrive(k_empty.index(stage), count=1)
    p, m, total, _ = weigh(masked(s, start, 0, row, 0, 1, S), never, none, FAST, False)
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
        t_b, t_kv, t_block, t_length, t_tiles, t_start = _place(lengths, then, HB, kv_heads, slots1, N)
        t_head = t_kv * group + t_block * (2 * NH) + GROUP * NH
        q = _queries(q_ptr, t_b, t_head, heads, NH, W, D)
        o = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, OUT))
        for tile in range(1, tiles):
            at = count + tile
            stage = at % K_STAGES
            k_tile = k_buffers.index(stage).reshape([N, D]).permute([1, 0])
            s_now = warpgroup_mma(mine, k_tile, nothing, use_acc=False, is_async=True)
            v_stage = (at - 1) % V_STAGES
            mbarrier.wait(v_full.index(v_stage), (at - 1) // V_STAGES & 1)
            o = warpgroup_mma(p16, v_buffers.index(v_stage).reshape([N, D]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_now])
            mbarrier.arrive(k_empty.index(stage), count=1)
            p, m, total, alpha = weigh(s, m, total, FAST, False)
            # As in the forward kernel, this branch keeps the wait for the product behind the exponentials.
            mbarrier.wait(
                k_full.index((at + 1) % K_STAGES), (at + 1) // K_STAGES & 1, pred=(tile + 1 < tiles) | more
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
        p, n_m, n_total, _ = weigh(masked(s, n_start, 0, row, 0, 1, S), never, none, FAST, False)
        mbarrier.wait(
            k_full.index((count + 1) % K_STAGES), (count + 1) // K_STAGES & 1,
            pred=((n_tiles > 1) & more) | (step + 2 < last),
        )  # fmt: skip
        o_now, p16, p = warpgroup_mma_wait(0, deps=[o, p16, p])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        p16 = gl.convert_layout(p.to(k_buffers.dtype), P)
        v2 = _ring(v2_ptr, b, kv_head, length, slots2, kv_heads, NH, W, D)
        k2 = _ring(k2_ptr, t_b, t_kv, t_length, slots2, kv_heads, NH, W, D)

        # The rows of one head differ in their short slot alone: weigh them, multiply by v2 and sum.
        valid = row % W < gl.minimum(length, slots2)
        if FAST:
            weight_GW = gl.where(valid, 1.0, 0.0).reshape([NH, W])
        else:
            m_GW = gl.where(valid, m, -float("inf")).reshape([NH, W])
            top_G = gl.max(m_GW, 1)
            top_G = gl.where(top_G == -float("inf"), 0.0, top_G)
            weight_GW = gl.exp2(m_GW - gl.expand_dims(top_G, 1))
        sum_G = gl.sum(weight_GW * total.reshape([NH, W]), 1)
        inverse_G = inverse(sum_G) if FAST else 1.0 / gl.where(sum_G > 0, sum_G, 1.0)
        share_GW = weight_GW * gl.expand_dims(inverse_G, 1)
        share = gl.convert_layout(share_GW.reshape([ROWS]), LO)
        if FAST:  # a NaN is in no range
            within = (share > SMALLEST) & (share < 1 / SMALLEST)
            bad = gl.where((row_out % W < gl.minimum(length, slots2)) & ~within, 1, bad)
        mine.store((o_now * gl.expand_dims(share, 1)).to(k_buffers.dtype))
        read = mine.reshape([NH, W, D]).load(L)
        o_GD = gl.sum(read.to(gl.float32) * v2.to(gl.float32), 1)
        o_GD = gl.where(length > 0, o_GD, 0.0)
        g = gl.arange(0, NH, gl.SliceLayout(1, gl.SliceLayout(1, L)))
        d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L)))
        o_row = (b * heads + head + g).to(gl.int64)
        gl.store(o_ptr + gl.expand_dims(o_row, 1) * D + gl.expand_dims(d, 0), o_GD.to(o_ptr.dtype.element_ty))
        mine.store(((q.to(gl.float32) * scale) * k2.to(gl.float32)).to(k_buffers.dtype).reshape([ROWS, D]))
        fence_async_shared()

        m, total = n_m, n_total
        b, kv_head, head, length, tiles, start = n_b, n_kv, n_head, n_length, n_tiles, n_start
        n_b, n_kv, n_head, n_length, n_tiles, n_start = t_b, t_kv, t_head, t_length, t_tiles, t_start
    return count, gl.max(bad, 0)


@gluon.jit
def _consume(
    GROUP: gl.constexpr, q_ptr, k2_ptr, v2_ptr, o_ptr, lengths, flags, agreed, u_buffers,
    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
    first, last, HB, heads, kv_heads, slots1, slots2, scale,
    NH: gl.constexpr, W: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    count, bad = _attend(
        GROUP, LIMIT > 0, q_ptr, k2_ptr, v2_ptr, o_ptr, lengths, u_buffers,
        k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, gl.to_tensor(0),
        first, last, HB, heads, kv_heads, slots1, slots2, scale, NH, W, LIMIT,
    )  # fmt: skip
    if LIMIT > 0:  # noqa: SIM102 - known when compiling
        if agree(GROUP, bad, flags, agreed):
            _attend(
                GROUP, False, q_ptr, k2_ptr, v2_ptr, o_ptr, lengths, u_buffers,
                k_full, k_empty, k_buffers, v_full, v_empty, v_buffers, count,
                first, last, HB, heads, kv_heads, slots1, slots2, scale, NH, W, LIMIT,
            )  # fmt: skip


@gluon.jit
def decode(
    q_ptr, k2_ptr, v2_ptr, k1_desc, v1_desc, o_ptr, lengths, flags,
    steps, each, HB: gl.constexpr, heads, kv_heads, slots1, slots2, scale,
    NH: gl.constexpr, W: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    LIMIT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write o (B, 1, Hq, D); a program does `each` of the steps. `scale` holds log2(e).

    `flags` has two numbers a program. Log-sum-exps (in powers of two) past LIMIT ask for the online softmax, which a
    LIMIT of 0 takes at once.
    """
    D: gl.constexpr = k1_desc.block_type.shape[2]
    k_buffers, k_full, k_empty = ring(k1_desc, K_STAGES)
    v_buffers, v_full, v_empty = ring(v1_desc, V_STAGES)
    u_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], k1_desc.dtype)
    u_buffers = gl.allocate_shared_memory(k1_desc.dtype, [4, ROWS, D], u_layout)
    agreed = agreement()
    flags += 2 * gl.program_id(0)
    first = gl.program_id(0) * each
    last = gl.minimum(first + each, steps)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    gl.constexpr(0), q_ptr, k2_ptr, v2_ptr, o_ptr, lengths, flags, agreed, u_buffers,
                    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
                    first, last, HB, heads, kv_heads, slots1, slots2, scale, NH, W, LIMIT,
                ),
            ),
            (
                _consume,
                (
                    gl.constexpr(1), q_ptr, k2_ptr, v2_ptr, o_ptr, lengths, flags, agreed, u_buffers,
                    k_full, k_empty, k_buffers, v_full, v_empty, v_buffers,
                    first, last, HB, heads, kv_heads, slots1, slots2, scale, NH, W, LIMIT,
                ),
            ),
            (
                _produce,
                (
                    k1_desc, k_full, k_empty, k_buffers, flags, agreed,
                    lengths, first, last, HB, kv_heads, slots1, LIMIT,
                ),
            ),
            (
                _produce,
                (
                    v1_desc, v_full, v_empty, v_buffers, flags, agreed,
                    lengths, first, last, HB, kv_heads, slots1, LIMIT,
                ),
            ),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip
