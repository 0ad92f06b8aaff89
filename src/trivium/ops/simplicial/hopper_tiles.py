"""What the Hopper kernels that stream keys share: rings of tiles, what two warpgroups agree on, a tile's softmax.

Warps that bring tiles by TMA fill a ring's buffers, and two warpgroups read them. A pass without a running maximum is
right for ordinary logits; where a query's log-sum-exp shows that it was not, the warpgroups agree to do all again.
"""

# Gluon functions are typed for its compiler: their layouts and blocks are compile-time values.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def ring(desc, STAGES: gl.constexpr):
    """Return buffers of `desc`'s tiles, and barriers of them full and empty, which two warpgroups read."""
    ROWS_A_TILE: gl.constexpr = desc.block_type.shape[1]
    D: gl.constexpr = desc.block_type.shape[2]
    buffers = gl.allocate_shared_memory(desc.dtype, [STAGES, 1, ROWS_A_TILE, D], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    return buffers, full, empty


@gluon.jit
def bring(desc, full, empty, buffers, count, b, kv_head, tiles, start):
    """Copy `tiles` tiles from key `start` into the ring, of which `count` were brought before; return the new count."""
    STAGES: gl.constexpr = buffers.type.shape[0]
    N: gl.constexpr = desc.block_type.shape[1]
    D: gl.constexpr = desc.block_type.shape[2]
    for tile in range(tiles):
        stage = count % STAGES
        mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            desc, [b, start + tile * N, kv_head * D], full.index(stage), buffers.index(stage)
        )
        count += 1
    return count


@gluon.jit
def agreement():
    """Return the barrier of `agree`."""
    barrier = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier.index(0), count=2)
    return barrier


@gluon.jit
def agree(GROUP: gl.constexpr, bad, flags, agreed):
    """Return whether either warpgroup found `bad`, once both have told; `flags` are two numbers of this program's."""
    gl.store(flags + GROUP, bad)
    mbarrier.arrive(agreed.index(0), count=1)
    return told(flags, agreed)


@gluon.jit
def told(flags, agreed):
    """Return whether a warpgroup found its pass bad, once both have told."""
    mbarrier.wait(agreed.index(0), 0)
    return gl.load(flags, volatile=True) + gl.load(flags + 1, volatile=True) > 0


@gluon.constexpr_function
def rows_layout(G, W, D):
    """Return a layout of (G, W, D) with 16 bytes a thread in which a sum over W stays inside a warp where it can."""
    warps_g = min(G, 4)
    warps_d = min(4 // warps_g, D // 32)
    across = D // warps_d // 8
    return gl.BlockedLayout(
        [1, 1, 8], [1, 32 // across, across], [warps_g, 4 // warps_g // warps_d, warps_d], [2, 1, 0]
    )


@gluon.jit
def masked(s, start, low, i_row, window1, MASK: gl.constexpr, S: gl.constexpr):
    """Return a tile of logits, whose first key is `start`, without the keys that its rows may not read."""
    j = start + gl.expand_dims(gl.arange(0, s.shape[1], gl.SliceLayout(0, S)), 0)
    if MASK == 1:  # one query: the tiles end at its own key
        s = gl.where(j >= low, s, -float("inf"))
    if MASK == 2:
        # As an unsigned number, what is before 0 is large: one comparison.
        past = (gl.expand_dims(i_row, 1) - j).to(gl.uint32)
        s = gl.where(past < gl.expand_dims(gl.minimum(window1, i_row + 1).to(gl.uint32), 1), s, -float("inf"))
    return s


@gluon.jit
def inverse(x):
    """Return 1 / x in one instruction, for x from 2^-126 to 2^126; a smaller x gives infinity, a larger one 0."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def log2(x):
    """Return the binary logarithm in one instruction, to 2^-22; what is smaller than 2^-126 gives minus infinity."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def row_sums(p, PARTIAL: gl.constexpr):
    """Return the sums of p's rows (ROWS,), or PARTIAL (ROWS, 4): as each thread holds them, without its neighbours."""
    if PARTIAL:
        p = gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3)
    return gl.sum(p, 1)


@gluon.jit
def weigh(s, m, total, FAST: gl.constexpr, PARTIAL: gl.constexpr):
    """Return (p, m, l, alpha) of a tile of logits in powers of two."""
    if FAST:
        alpha = m
        p = gl.exp2(s)
        total += row_sums(p, PARTIAL)
    else:
        grown = gl.maximum(m, gl.max(s, 1))
        safe = gl.where(grown == -float("inf"), 0.0, grown)
        alpha = gl.exp2(m - safe)
        p = gl.exp2(s - gl.expand_dims(safe, 1))
        total = total * alpha + gl.sum(p, 1)
        m = grown
    return p, m, total, alpha
