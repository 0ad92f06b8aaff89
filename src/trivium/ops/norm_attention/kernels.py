"""The Triton kernels of a norm, the projection to queries, keys and values, and attention from the cache, in one.

A program has some rows and HEADS key heads with their query heads: what it multiplies stays in registers, keys and
values go straight into the cache. Shapes: D numbers of a token, H query heads, G key heads, K head width, S slots of
the cache; the weight is (H + 2 G) K by D, the queries' rows first, then the keys'. Position p lies in slot p mod S.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl

from trivium.ops.fused_linear.kernels import _normed

FAR = tl.constexpr(-1e30)


@triton.jit
def _project(h, weight, bias, head, D: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
             BIASED: tl.constexpr):  # fmt: skip
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
    BM: tl.constexpr, BS: tl.constexpr, HEADS: tl.constexpr,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write o (B, H, K) of one new token a row, and its key and value into its slot unless `added` is 0."""
    first = tl.program_id(0) % (G // HEADS) * HEADS
    block, r = tl.program_id(0) // (G // HEADS), tl.arange(0, BM)
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
    for head in range(HEADS):
        g = first + head
        new_k = _project(h, weight, bias, H + g, D, BD, K, BK, BIASED)
        new_v = _project(h, weight, bias, H + G + g, D, BD, K, BK, BIASED)
        base = r * slots * (G * K) + g * K
        for member in range(H // G):
            q = _project(h, weight, bias, g * (H // G) + member, D, BD, K, BK, BIASED)
            # The new token is read from registers, the cache without its slot.
            top = tl.where(add > 0, tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale, FAR)
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
                logits = tl.where(old, tl.sum(k.to(tl.float32) * q.to(tl.float32)[:, None, :], 2) * scale, FAR)
                higher = tl.maximum(top, tl.max(logits, 1))
                shrink = tl.exp2(top - higher)
                weights = tl.where(old, tl.exp2(logits - higher[:, None]), 0.0)
                total = total * shrink + tl.sum(weights, 1)
                acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32), 1)
                top = higher
            at_o = (r * H + g * (H // G) + member)[:, None] * K + c[None, :]
            y = acc / tl.where(inside, total, 1.0)[:, None]
            tl.store(o + at_o, y.to(o.dtype.element_ty), mask=inside[:, None] & (c < K)[None, :])
        to = (base + slot * (G * K))[:, None] + c[None, :]
        tl.store(keys + to, new_k, mask=writes[:, None] & (c < K)[None, :])
        tl.store(values + to, new_v, mask=writes[:, None] & (c < K)[None, :])
    # Every thread has read the count; the last of a row's programs writes the new one.
    tl.debug_barrier()
    before = tl.atomic_add(length + m, tl.full((BM,), 4294967296, tl.int64), mask=inside, sem="relaxed")
    tl.store(length + m, after, mask=inside & (before // 4294967296 == G // HEADS - 1))


@triton.jit
def prompt_kernel(
    x, gamma, beta, weight, bias, keys, values, length, added, o, rows, tokens, slots, window, eps, scale,
    D: tl.constexpr, BD: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, HEADS: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write o (B, T, H, K) of the first T tokens of each row, and keys and values of all of them into an empty cache.

    A program has BM // T whole rows.
    """
    first = tl.program_id(0) % (G // HEADS) * HEADS
    block, i = tl.program_id(0) // (G // HEADS), tl.arange(0, BM)
    together = BM // tokens
    r, t = i // tokens, i % tokens
    row = block * together + r
    inside = (r < together) & (row < rows)
    m = tl.where(inside, block * together * tokens + i, rows * tokens)
    age = t[:, None] - t[None, :]
    allowed = (r[:, None] == r[None, :]) & (age >= 0) & (age < window)
    c = tl.arange(0, BK)
    wide = inside[:, None] & (c < K)[None, :]
    h = _normed(x, gamma, beta, m, rows * tokens, eps, D, BD, CENTRED).to(weight.dtype.element_ty)
    for head in range(HEADS):
        g = first + head
        k = _project(h, weight, bias, H + g, D, BD, K, BK, BIASED)
        v = _project(h, weight, bias, H + G + g, D, BD, K, BK, BIASED)
        at = ((row.to(tl.int64) * slots + t) * G + g)[:, None] * K + c[None, :]
        tl.store(keys + at, k, mask=wide)
        tl.store(values + at, v, mask=wide)
        for member in range(H // G):
            q = _project(h, weight, bias, g * (H // G) + member, D, BD, K, BK, BIASED)
            logits = tl.where(allowed, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
            weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
            total = tl.sum(weights, 1)
            y = tl.dot(weights.to(v.dtype), v) / total[:, None]
            at_o = (m.to(tl.int64) * H + g * (H // G) + member)[:, None] * K + c[None, :]
            tl.store(o + at_o, y.to(o.dtype.element_ty), mask=wide)
    after = tokens + row.to(tl.int64) * 0
    if MASKED:
        after = tl.load(added + row, mask=inside, other=0)
    tl.store(length + row, after, mask=inside & (t == 0) & (first == 0))
