"""The Triton kernels of short causal attention: all scores of one sequence and key head fit one program's registers.

`x` holds the query heads, then the key heads, then the value heads of each token. The backward pass computes the
scores again: reading queries and keys once more costs less than keeping what the forward pass found.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl


@triton.jit
def _weights(q, k, allowed, scale, PRECISION: tl.constexpr):
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    logits = tl.where(allowed, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _place(batch, head, heads, tokens, t, c, D: tl.constexpr):
    return ((batch.to(tl.int64) * tokens + t[:, None]) * heads + head) * D + c[None, :]


@triton.jit
def forward_kernel(
    x, o, tokens, window, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o (B, T, H, D) for one row and key head; x is (B, T, H + 2 KV, D), contiguous."""
    batch, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    t, c = tl.arange(0, BT), tl.arange(0, BD)
    inside = (t[:, None] < tokens) & (c[None, :] < D)
    age = t[:, None] - t[None, :]
    allowed = (age >= 0) & (age < window)
    k = tl.load(x + _place(batch, HEADS + kv, HEADS + 2 * KV, tokens, t, c, D), mask=inside, other=0.0)
    v = tl.load(x + _place(batch, HEADS + KV + kv, HEADS + 2 * KV, tokens, t, c, D), mask=inside, other=0.0)
    for member in range(HEADS // KV):
        head = kv * (HEADS // KV) + member
        q = tl.load(x + _place(batch, head, HEADS + 2 * KV, tokens, t, c, D), mask=inside, other=0.0)
        weights = _weights(q, k, allowed, scale, PRECISION)
        read = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        tl.store(o + _place(batch, head, HEADS, tokens, t, c, D), read.to(o.dtype.element_ty), mask=inside)


@triton.jit
def prompt_kernel(
    x, o, keys, values, length, added, tokens, slots, window, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Do what `forward_kernel` does, and write keys and values into the first slots of caches (B, S, KV, D), of which T
    tokens count, or as many as `added` says.
    """
    batch, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    t, c = tl.arange(0, BT), tl.arange(0, BD)
    inside = (t[:, None] < tokens) & (c[None, :] < D)
    age = t[:, None] - t[None, :]
    allowed = (age >= 0) & (age < window)
    k = tl.load(x + _place(batch, HEADS + kv, HEADS + 2 * KV, tokens, t, c, D), mask=inside, other=0.0)
    v = tl.load(x + _place(batch, HEADS + KV + kv, HEADS + 2 * KV, tokens, t, c, D), mask=inside, other=0.0)
    tl.store(keys + _place(batch, kv, KV, slots, t, c, D), k, mask=inside)
    tl.store(values + _place(batch, kv, KV, slots, t, c, D), v, mask=inside)
    for member in range(HEADS // KV):
        head = kv * (HEADS // KV) + member
        q = tl.load(x + _place(batch, head, HEADS + 2 * KV, tokens, t, c, D), mask=inside, other=0.0)
        weights = _weights(q, k, allowed, scale, PRECISION)
        read = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        tl.store(o + _place(batch, head, HEADS, tokens, t, c, D), read.to(o.dtype.element_ty), mask=inside)
    after = batch * 0 + tokens
    if MASKED:
        after = tl.load(added + batch)
    tl.store(length + batch, after, mask=kv == 0)


@triton.jit
def backward_kernel(
    do, x, dx, tokens, window, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dx, laid out as x, for one row and key head; do is (B, T, H, D), contiguous."""
    batch, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    t, c = tl.arange(0, BT), tl.arange(0, BD)
    inside = (t[:, None] < tokens) & (c[None, :] < D)
    age = t[:, None] - t[None, :]
    allowed = (age >= 0) & (age < window)
    at_k = _place(batch, HEADS + kv, HEADS + 2 * KV, tokens, t, c, D)
    at_v = _place(batch, HEADS + KV + kv, HEADS + 2 * KV, tokens, t, c, D)
    k = tl.load(x + at_k, mask=inside, other=0.0)
    v = tl.load(x + at_v, mask=inside, other=0.0)
    dk = tl.zeros((BT, BD), tl.float32)
    dv = tl.zeros((BT, BD), tl.float32)
    for member in range(HEADS // KV):
        head = kv * (HEADS // KV) + member
        at_q = _place(batch, head, HEADS + 2 * KV, tokens, t, c, D)
        q = tl.load(x + at_q, mask=inside, other=0.0)
        dread = tl.load(do + _place(batch, head, HEADS, tokens, t, c, D), mask=inside, other=0.0)
        weights = _weights(q, k, allowed, scale, PRECISION)
        dv += tl.dot(tl.trans(weights.to(dread.dtype)), dread, input_precision=PRECISION)
        dweights = tl.dot(dread, tl.trans(v), input_precision=PRECISION)
        dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None]) * scale
        dlogits = dlogits.to(k.dtype)
        dq = tl.dot(dlogits, k, input_precision=PRECISION)
        tl.store(dx + at_q, dq.to(dx.dtype.element_ty), mask=inside)
        dk += tl.dot(tl.trans(dlogits), q, input_precision=PRECISION)
    tl.store(dx + at_k, dk.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + at_v, dv.to(dx.dtype.element_ty), mask=inside)
