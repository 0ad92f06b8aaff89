"""Backward of trilinear 2-simplicial attention for Hopper, in Gluon: FlashAttention's backward of *virtual keys*.

A virtual key is a pair (j, k) of a long and a short key: K[j,k] = k1[j] * k2[k], V[j,k] = v1[j] * v2[k]. A query reads
them as ordinary keys, so the backward pass takes five matrix products a tile, one fewer than with virtual queries:

    S = K q',  dP = V do',  dV += P do,  dK += dS q,  dq += dS' K     with P = exp(S - L), dS = P (dP - delta)

and from dK, dV of many queries and heads follow dk1[j] += k2[k] dK, dk2[k] += sum over j of k1[j] dK, and so on.

A work item is 128 virtual keys, four strips of 32 long keys with one short key each. Its rows are the queries that can
read them, all heads of a group, 64 a tile. Two warpgroups own 64 virtual keys each, with dK and dV in registers; for dq
each computes half of the channels from both groups' dS. A warp brings tiles of q, do and the rows' statistics.
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
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # (query, head) pairs of a tile
KEYS = gl.constexpr(64)  # virtual keys of a warpgroup; two share the rows
STRIP = gl.constexpr(32)  # long keys beside each other with one short key


@gluon.jit
def _item(step, items, full, rest, together, tokens, window1, window2, HB, NI: gl.constexpr):
    """Return what this program's item number `step` is: see `_keys`, and then its first tile of rows and their count.

    The long keys that some query reads beside short key k lie in k - window1 < j < k + window2. Counted from the end
    they are `full` blocks of 128, and `rest` strips (0 to 3), which `together` neighbouring short keys have in common.
    """
    item = gl.program_id(0) + step * gl.num_programs(0)
    pair = item // items
    item = item % items
    a_unit = together * full + (rest + 3) // 4
    first_k = item // a_unit * together
    local = item % a_unit
    whole = local < together * full
    whole_k = first_k + local // gl.maximum(full, 1)
    short = gl.where(whole, whole_k, first_k)  # the first short key
    shorts = gl.where(whole, 1, together)
    strips = gl.where(whole, 4, rest)  # of each short key
    back = gl.where(whole, 128 * (local % gl.maximum(full, 1) + 1), 128 * full + 32 * rest)
    start = short + window2 - back  # the first long key of the first short key
    last_k = gl.minimum(short + shorts, tokens) - 1
    last_j = gl.minimum(last_k + window2 - back + STRIP * strips, tokens) - 1
    first_i = gl.maximum(gl.maximum(short, start), 0)
    last_i = gl.minimum(gl.minimum(last_k + window2, last_j + window1), tokens) - 1
    some = (last_j >= 0) & (last_i >= first_i) & (short < tokens)
    first = first_i // NI
    tiles = gl.where(some, (last_i // NI - first + 1) * HB, 0)
    return pair, short, shorts, strips, start, first, tiles


@gluon.jit
def _keys(row, short, shorts, strips, start, tokens):
    """Return (j, k, whether there is such a pair) of the virtual keys `row` of an item."""
    strip = row // STRIP
    k = short + strip // strips
    j = start + strip // strips + STRIP * (strip % strips) + row % STRIP
    return j, k, (k < gl.minimum(short + shorts, tokens)) & (j >= 0) & (j < tokens)


@gluon.jit
def _produce(
    q_desc, do_desc, stats_ptr, q_buffers, do_buffers, stats, q_full, do_full, stats_full, empty,
    steps, items, full, rest, together, tokens, kv_heads, group, units_i, window1, window2, HB,
):  # fmt: skip
    STAGES: gl.constexpr = q_buffers.type.shape[0]
    NI: gl.constexpr = q_desc.block_type.shape[1]
    NH: gl.constexpr = q_desc.block_type.shape[2]
    L: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    count = 0
    for step in range(steps):
        pair, _, _, _, _, first, tiles = _item(step, items, full, rest, together, tokens, window1, window2, HB, NI)
        b = pair // kv_heads
        kv_head = pair % kv_heads
        for tile in range(tiles):
            stage = count % STAGES
            phase = (count // STAGES & 1) ^ 1
            at = [b, (first + tile // HB) * NI, kv_head * group + tile % HB * NH, 0]
            place = (pair * units_i + first) * HB + tile
            x = gl.load(stats_ptr + place.to(gl.int64) * (2 * ROWS) + gl.arange(0, 2 * ROWS, L))
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, at, q_full.index(stage), q_buffers.index(stage))
            stats.index(stage).store(x)
            mbarrier.arrive(stats_full.index(stage), count=1)
            mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(do_desc, at, do_full.index(stage), do_buffers.index(stage))
            count += 1


@gluon.jit
def _add_rows(ptr, x):
    """Add a float32 tile (64, C) in a matrix accumulator's layout to memory in the order of its registers.

    That order is (C / 8, thread, row bit 3, column bit 0): 16 bytes a thread, 512 in a row a warp.
    """
    C: gl.constexpr = x.shape[1]
    pieces = x.reshape([4, 2, 8, C // 8, 4, 2]).permute([0, 2, 4, 3, 1, 5]).reshape([128, C // 8, 2, 2])
    left, right = gl.split(pieces)
    x0, x2 = gl.split(left)
    x1, x3 = gl.split(right)
    L: gl.constexpr = x0.type.layout
    thread = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(1, L)), 1)
    column = gl.expand_dims(gl.arange(0, C // 8, gl.SliceLayout(0, L)), 0)
    gl.inline_asm_elementwise(
        "mov.u32 $0, 0; red.relaxed.gpu.global.add.v4.f32 [$1], {$2, $3, $4, $5};",
        "=r,l,r,r,r,r",
        [(ptr + (column * 512 + thread * 4)).to(gl.int64), x0, x1, x2, x3],
        gl.int32,
        False,
        1,
    )


@gluon.jit
def _add_keys(ptr, x, row, valid, D: gl.constexpr):
    """Add a float32 tile (64, D) to rows of memory, two channels at a time."""
    x0, x1 = gl.split(x.reshape([KEYS, D // 2, 2]))
    L: gl.constexpr = x0.type.layout
    row = gl.convert_layout(row, gl.SliceLayout(1, L))
    valid = gl.convert_layout(valid.to(gl.int32), gl.SliceLayout(1, L))
    column = gl.expand_dims(gl.arange(0, D // 2, gl.SliceLayout(0, L)), 0)
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred p;
            mov.u32 $0, 0;
            setp.ne.s32 p, $4, 0;
            @p red.relaxed.gpu.global.add.v2.f32 [$1], {$2, $3};
        }
        """,
        "=r,l,r,r,r",
        [(ptr + (gl.expand_dims(row, 1) * D + column * 2)).to(gl.int64), x0, x1, gl.expand_dims(valid, 1)],
        gl.int32,
        False,
        1,
    )


@gluon.jit
def _virtual(long_ptr, short_ptr, b, kv_head, tokens, kv_heads, first, short, shorts, strips, start, D: gl.constexpr):
    """Return 64 virtual keys or values (64, D), from row `first` of the item; 0 where there is none."""
    across: gl.constexpr = D // 8
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    row = first + gl.arange(0, KEYS, gl.SliceLayout(1, L))
    j, k, there = _keys(row, short, shorts, strips, start, tokens)
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, L)), 0)
    j_at = gl.expand_dims(((b * tokens + j).to(gl.int64) * kv_heads + kv_head) * D, 1)
    k_at = gl.expand_dims(((b * tokens + k).to(gl.int64) * kv_heads + kv_head) * D, 1)
    there = gl.expand_dims(there, 1) & (d >= 0)
    x = gl.load(long_ptr + j_at + d, mask=there, other=0.0)
    y = gl.load(short_ptr + k_at + d, mask=there, other=0.0)
    return (x.to(gl.float32) * y.to(gl.float32)).to(x.dtype)


@gluon.jit
def _give(
    x, long_ptr, short_ptr, d_long, d_short, b, kv_head, tokens, kv_heads, first, short, shorts, strips, start,
    D: gl.constexpr,
):  # fmt: skip
    """Add a gradient of virtual keys or values (64, D) to those of the long and of the short ones."""
    L: gl.constexpr = x.type.layout
    row = first + gl.arange(0, KEYS, gl.SliceLayout(1, L))
    j, k, there = _keys(row, short, shorts, strips, start, tokens)
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, L)), 0)
    j_row = (b * tokens + j).to(gl.int64) * kv_heads + kv_head
    k_row = (b * tokens + k).to(gl.int64) * kv_heads + kv_head
    mask = gl.expand_dims(there, 1) & (d >= 0)
    y = gl.load(short_ptr + gl.expand_dims(k_row * D, 1) + d, mask=mask, other=0.0).to(gl.float32)
    _add_keys(d_long, x * y, j_row, there, D)
    z = gl.load(long_ptr + gl.expand_dims(j_row * D, 1) + d, mask=mask, other=0.0).to(gl.float32)
    sums = gl.sum((x * z).reshape([KEYS // STRIP, STRIP, D]), 1)
    LS: gl.constexpr = sums.type.layout
    strip = first // STRIP + gl.arange(0, KEYS // STRIP, gl.SliceLayout(1, LS))
    k = short + strip // strips
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, LS)), 0)
    k_at = gl.expand_dims(((b * tokens + k).to(gl.int64) * kv_heads + kv_head) * D, 1)
    there = gl.expand_dims(k < gl.minimum(short + shorts, tokens), 1) & (d >= 0)
    gl.atomic_add(d_short + k_at + d, sums, mask=there, sem="relaxed")


@gluon.jit
def _queries_share(ds_buffers, parity, mine, other, nothing, GROUP: gl.constexpr):
    """Return dq of a tile (64, D / 2) in the making: dS' K of this group's virtual keys and of the other's."""
    dq = warpgroup_mma(
        ds_buffers.index(parity * 2 + GROUP).permute([1, 0]), mine, nothing, use_acc=False, is_async=True
    )
    return warpgroup_mma(ds_buffers.index(parity * 2 + 1 - GROUP).permute([1, 0]), other, dq, is_async=True)


@gluon.jit
def _consume(
    GROUP: gl.constexpr, k1, k2, v1, v2, dq, dk1, dk2, dv1, dv2,
    k_buffers, v_buffers, q_buffers, do_buffers, stats, ds_buffers,
    q_full, do_full, stats_full, empty, k_ready, k_done, ds_full,
    steps, items, full, rest, together, tokens, kv_heads, units_i, window1, window2, HB, scale,
    NI: gl.constexpr, NH: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = q_buffers.type.shape[0]
    D: gl.constexpr = k_buffers.type.shape[2]
    HALF: gl.constexpr = D // 2
    dtype: gl.constexpr = k_buffers.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    first_row: gl.constexpr = GROUP * KEYS
    factor = scale * 1.4426950408889634
    no_logits = gl.zeros([KEYS, ROWS], gl.float32, S)
    no_dq = gl.zeros([ROWS, HALF], gl.float32, DQ)
    keys = k_buffers.index(GROUP)
    values = v_buffers.index(GROUP)
    mine = k_buffers.index(GROUP).slice(GROUP * HALF, HALF, dim=1)
    other = k_buffers.index(1 - GROUP).slice(GROUP * HALF, HALF, dim=1)
    column = gl.arange(0, ROWS, gl.SliceLayout(0, S))
    count = 0
    done = 0
    for step in range(steps):
        pair, short, shorts, strips, start, first, tiles = _item(
            step, items, full, rest, together, tokens, window1, window2, HB, NI
        )
        if tiles > 0:
            b = pair // kv_heads
            kv_head = pair % kv_heads
            x = _virtual(k1, k2, b, kv_head, tokens, kv_heads, first_row, short, shorts, strips, start, D)
            mbarrier.wait(k_done.index(0), (done & 1) ^ 1)
            keys.store(x)
            x = _virtual(v1, v2, b, kv_head, tokens, kv_heads, first_row, short, shorts, strips, start, D)
            values.store(x)
            fence_async_shared()
            mbarrier.arrive(k_ready.index(0), count=1)
            j, k, there = _keys(
                first_row + gl.arange(0, KEYS, gl.SliceLayout(1, S)), short, shorts, strips, start, tokens
            )
            # The queries that read a virtual key are low.. low + span.
            low = gl.maximum(j, k)
            span = gl.minimum(gl.minimum(j + window1, k + window2), tokens) - low
            span = gl.where(there, gl.maximum(span, 0), 0)
            dk = gl.zeros([KEYS, D], gl.float32, OUT)
            dv = gl.zeros([KEYS, D], gl.float32, OUT)
            place = (pair * units_i + first) * HB
            mbarrier.wait(k_ready.index(0), done & 1)
            for tile in range(tiles):
                at = count + tile
                stage = at % STAGES
                phase = at // STAGES & 1
                parity = at & 1
                q_tile = q_buffers.index(stage).reshape([ROWS, D])
                do_tile = do_buffers.index(stage).reshape([ROWS, D])
                # First dq of the tile before (of the first tile: of anything, and dropped): by now both groups' dS are
                # there. It is out of the registers before dP needs them.
                mbarrier.wait(ds_full.index(1 - parity), (at - 1) // 2 & 1, pred=tile > 0)
                dq_now = _queries_share(ds_buffers, 1 - parity, mine, other, no_dq, GROUP)
                mbarrier.wait(q_full.index(stage), phase)
                s_now = warpgroup_mma(keys, q_tile.permute([1, 0]), no_logits, use_acc=False, is_async=True)
                dq_tile = warpgroup_mma_wait(1, deps=[dq_now])
                if tile > 0:
                    _add_rows(dq + ((place + tile - 1).to(gl.int64) * (ROWS * D) + GROUP * ROWS * HALF), dq_tile)
                mbarrier.wait(do_full.index(stage), phase)
                dp_now = warpgroup_mma(values, do_tile.permute([1, 0]), no_logits, use_acc=False, is_async=True)
                mbarrier.wait(stats_full.index(stage), phase)
                low_S = stats.index(stage).slice(0, ROWS).load(gl.SliceLayout(0, S))
                s = warpgroup_mma_wait(1, deps=[s_now])
                p = gl.exp2(s * factor + gl.expand_dims(low_S, 0))
                i = (first + tile // HB) * NI
                if NI == 1:
                    past = (i - low).to(gl.uint32, bitcast=True)
                    allowed = gl.expand_dims(past < span.to(gl.uint32, bitcast=True), 1)
                else:
                    past = gl.expand_dims(i + column // NH, 0) - gl.expand_dims(low, 1)
                    allowed = past.to(gl.uint32, bitcast=True) < gl.expand_dims(span.to(gl.uint32, bitcast=True), 1)
                p = gl.where(allowed, p, 0.0)
                p16 = gl.convert_layout(p.to(dtype), P)
                delta_S = stats.index(stage).slice(ROWS, ROWS).load(gl.SliceLayout(0, S))
                dp = warpgroup_mma_wait(0, deps=[dp_now])
                dv = warpgroup_mma(p16, do_tile, dv, is_async=True)
                ds = (p * (dp - gl.expand_dims(delta_S, 0))).to(dtype)
                ds_buffers.index(parity * 2 + GROUP).store(ds)
                fence_async_shared()
                mbarrier.arrive(ds_full.index(parity), count=1)
                ds16 = gl.convert_layout(ds, P)
                dk = warpgroup_mma(ds16, q_tile, dk, is_async=True)
                dv, dk, p16, ds16 = warpgroup_mma_wait(0, deps=[dv, dk, p16, ds16])
                mbarrier.arrive(empty.index(stage), count=1)
            last = count + tiles - 1
            mbarrier.wait(ds_full.index(last & 1), last // 2 & 1)
            dq_now = _queries_share(ds_buffers, last & 1, mine, other, no_dq, GROUP)
            dq_tile = warpgroup_mma_wait(0, deps=[dq_now])
            _add_rows(dq + ((place + tiles - 1).to(gl.int64) * (ROWS * D) + GROUP * ROWS * HALF), dq_tile)
            mbarrier.arrive(k_done.index(0), count=1)
            count += tiles
            done += 1
            _give(dv, v1, v2, dv1, dv2, b, kv_head, tokens, kv_heads, first_row, short, shorts, strips, start, D)
            _give(
                dk * scale, k1, k2, dk1, dk2, b, kv_head, tokens, kv_heads, first_row, short, shorts, strips, start, D
            )  # fmt: skip


@gluon.jit
def backward(
    q_desc, do_desc, stats_ptr, k1_ptr, k2_ptr, v1_ptr, v2_ptr, dq_ptr, dk1_ptr, dk2_ptr, dv1_ptr, dv2_ptr,
    total, items, full, rest, together, tokens, kv_heads, group, units_i, window1, window2, HB, scale,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Add to dq (tiles, 64 * D) in the order of `_add_rows`, not scaled, and to dk1, dk2, dv1, dv2 (B, T, Hkv, D)."""
    NI: gl.constexpr = q_desc.block_type.shape[1]
    NH: gl.constexpr = q_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[3]
    dtype: gl.constexpr = q_desc.dtype
    keys_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_buffers = gl.allocate_shared_memory(dtype, [2, KEYS, D], keys_layout)
    v_buffers = gl.allocate_shared_memory(dtype, [2, KEYS, D], keys_layout)
    q_buffers = gl.allocate_shared_memory(dtype, [STAGES, 1, NI, NH, D], q_desc.layout)
    do_buffers = gl.allocate_shared_memory(dtype, [STAGES, 1, NI, NH, D], do_desc.layout)
    ds_buffers = gl.allocate_shared_memory(dtype, [4, KEYS, ROWS], ds_layout)
    stats = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * ROWS], flat)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    stats_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(do_full.index(stage), count=1)
        mbarrier.init(stats_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for parity in gl.static_range(2):
        mbarrier.init(ds_full.index(parity), count=2)
    mbarrier.init(k_ready.index(0), count=2)
    mbarrier.init(k_done.index(0), count=2)
    steps = (total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    gl.constexpr(0), k1_ptr, k2_ptr, v1_ptr, v2_ptr, dq_ptr, dk1_ptr, dk2_ptr, dv1_ptr, dv2_ptr,
                    k_buffers, v_buffers, q_buffers, do_buffers, stats, ds_buffers,
                    q_full, do_full, stats_full, empty, k_ready, k_done, ds_full,
                    steps, items, full, rest, together, tokens, kv_heads, units_i, window1, window2, HB, scale,
                    NI, NH,
                ),
            ),
            (
                _consume,
                (
                    gl.constexpr(1), k1_ptr, k2_ptr, v1_ptr, v2_ptr, dq_ptr, dk1_ptr, dk2_ptr, dv1_ptr, dv2_ptr,
                    k_buffers, v_buffers, q_buffers, do_buffers, stats, ds_buffers,
                    q_full, do_full, stats_full, empty, k_ready, k_done, ds_full,
                    steps, items, full, rest, together, tokens, kv_heads, units_i, window1, window2, HB, scale,
                    NI, NH,
                ),
            ),
            (
                _produce,
                (
                    q_desc, do_desc, stats_ptr, q_buffers, do_buffers, stats,
                    q_full, do_full, stats_full, empty,
                    steps, items, full, rest, together, tokens, kv_heads, group, units_i, window1, window2, HB,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
