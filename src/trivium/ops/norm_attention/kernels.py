"""The Triton kernel of a norm, the projection to queries, keys and values, and a step of attention from the cache.

A program has some rows and one key head with its query heads: what it multiplies stays in registers, the new key and
value go straight into the cache. Shapes: D numbers of a token, H query heads, G key heads, K head width, S slots of the
cache; the weight is (H + 2 G) K by D, the queries' rows first, then the keys'. Position p lies in slot p mod S.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl

from trivium.ops.fused_linear.kernels import _normed

FAR = tl.constexpr(-1e30)


@triton.jit
def _project(
    h, weight, bias, head, D: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Return h (M, BD) times the weight of one head, and its bias."""
    d, c = tl.arange(0, BD), tl.arange(0, BK)
    w = tl.load(weight + (head * K + c)[:, None] * D + d[None, :], mask=(c < K)[:, None] & (d < D)[None, :], other=0.0)
    y = tl.dot(h, tl.trans(w))
    if BIASED:
        y += tl.load(bias + head * K + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
    return y.to(weight.dtype.element_ty)


@triton.jit
def step_kernel(
    x, gamma, beta, weight, bias, keys, values, length, added, o, rows, slots, eps, scale,
    D: tl.constexpr, BD: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write o (B, H, K) of one new token a row, and its key and value into its slot unless `added` is 0."""
    block, g = tl.program_id(0) // G, tl.program_id(0) % G
    r = tl.arange(0, BM)
    m = block * BM + r
    inside = m < rows
    # Offsets from a program's first row fit 32 bits.
    keys += block.to(tl.int64) * BM * slots * (G * K)
    values += block.to(tl.int64) * BM * slots * (G * K)
    o += block.to(tl.int64) * BM * (H * K)
    # The upper half of a row's count says how many of its programs are done with it.
    seen = tl.load(length + m, mask=inside, other=0) % 4294967296
    add = seen * 0 + 1
    if MASKED:
        add = tl.load(added + m, mask=inside, other=0)
    after = seen + add
    slot = (seen % slots).to(tl.int32)
    count = tl.minimum(tl.maximum(after, 1), slots).to(tl.int32)
    writes = inside & (add > 0)
    c, s = tl.arange(0, BK), tl.arange(0, BS)
    h = _normed(x, gamma, beta, m, rows, eps, D, BD, CENTRED).to(weight.dtype.element_ty)
    new_k = _project(h, weight, bias, H + g, D, BD, K, BK, BIASED)
    new_v = _project(h, weight, bias, H + G + g, D, BD, K, BK, BIASED)
    base = r * slots * (G * K) + g * K
    for member in range(H // G):
        head = g * (H // G) + member
        q = _project(h, weight, bias, head, D, BD, K, BK, BIASED).to(tl.float32)
        # The new token is read from registers, the cache without its slot.
        top = tl.where(add > 0, tl.sum(q * new_k.to(tl.float32), 1) * scale, FAR)
        total = tl.where(add > 0, 1.0, 0.0)
        acc = tl.where((add > 0)[:, None], new_v.to(tl.float32), 0.0)
        for s0 in range(0, slots, BS):
            place = s0 + s
            old = (place[None, :] < count[:, None]) & inside[:, None]
            old = old & ((place[None, :] != slot[:, None]) | (add == 0)[:, None])
            at = base[:, None, None] + (place * (G * K))[None, :, None] + c[None, None, :]
            wanted = old[:, :, None] & (c < K)[None, None, :]
            k = tl.load(keys + at, mask=wanted, other=0.0)
            v = tl.load(values + at, mask=wanted, other=0.0)
            logits = tl.where(old, tl.sum(k.to(tl.float32) * q[:, None, :], 2) * scale, FAR)
            higher = tl.maximum(top, tl.max(logits, 1))
            shrink = tl.exp2(top - higher)
            weights = tl.where(old, tl.exp2(logits - higher[:, None]), 0.0)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32), 1)
            top = higher
        y = acc / tl.where(inside, total, 1.0)[:, None]
        at_o = (r * H + head)[:, None] * K + c[None, :]
        tl.store(o + at_o, y.to(o.dtype.element_ty), mask=inside[:, None] & (c < K)[None, :])
    to = (base + slot * (G * K))[:, None] + c[None, :]
    tl.store(keys + to, new_k, mask=writes[:, None] & (c < K)[None, :])
    tl.store(values + to, new_v, mask=writes[:, None] & (c < K)[None, :])
    # Every thread has read the count; the last of a row's programs writes the new one.
    tl.debug_barrier()
    before = tl.atomic_add(length + m, tl.full((BM,), 4294967296, tl.int64), mask=inside, sem="relaxed")
    tl.store(length + m, after, mask=inside & (before // 4294967296 == G - 1))
