"""What the Triton kernels of 2-simplicial attention share: the rows of a tile, virtual queries, and their reach.

A tile's rows are BI queries x BG heads of one group x BK keys of the short window, in this order, the last one
fastest; its columns are BN keys of the long window. Row (i, h, age) is the virtual query q[i,h] * k_short[i - age]
(or their cross product, triple by triple, in the determinant form), an ordinary query over the long keys.

Determinants: with n and p the next and the previous channel of a triple, the virtual query is
u[l] = s a[n(l)] q[p(l)] - s a[p(l)] q[n(l)], a the short key; s = 1, or -1 where the pairs are swapped. Channels left
over have n(l) = p(l) = l and the first term alone. So every form is one or two products of permuted factors ("terms").
"""

import triton
import triton.language as tl

from trivium.ops.simplicial.triton_support import interpreted

INTERPRETED: tl.constexpr = tl.constexpr(interpreted())
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Finite, so that a row whose first tile is all masked has no inf - inf; its sums vanish at its first allowed key.
FAR: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b, summed in float32."""
    if INTERPRETED:  # whose matrix product takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_rows(i0, g0, age0, tokens, group, short, BI: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr):
    """Return query offset, head offset, age and validity of each row of a tile."""
    r = tl.arange(0, BI * BG * BK)
    age = age0 + r % BK
    head = (r // BK) % BG
    ii = r // (BK * BG)
    valid = (age < short) & (age <= i0 + ii) & (i0 + ii < tokens) & (g0 + head < group)
    return ii, head, age, valid


@triton.jit
def same_document(documents, i0, ii, age, valid):
    """Return the document of each row, and whether its short key is of the same."""
    own = tl.load(documents + i0 + ii, mask=valid, other=0)
    of_key = tl.load(documents + i0 + ii - age, mask=valid, other=0)
    return own, valid & (own == of_key)


@triton.jit
def load_rows(pointer, offsets, valid, channels, D: tl.constexpr, BD: tl.constexpr):
    """Return the rows at `offsets`, zero where they are not valid."""
    mask = valid[:, None]
    if D != BD:
        mask = mask & (channels < D)[None, :]
    return tl.load(pointer + offsets[:, None] + channels[None, :], mask=mask, other=0.0)


@triton.jit
def load_keys(pointer, j, tokens, stride, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Return rows j of a tensor of keys or values; without MASKED all j are known to exist."""
    channels = tl.arange(0, BD)
    at = pointer + j[:, None] * stride + channels[None, :]
    if MASKED:
        mask = (j < tokens)[:, None]
        if D != BD:
            mask = mask & (channels < D)[None, :]
        x = tl.load(at, mask=mask, other=0.0)
    elif D != BD:
        x = tl.load(at, mask=(channels < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def turned(channels, STEP: tl.constexpr, D: tl.constexpr):
    """Return the channel STEP places on within its triple; channels left over stay."""
    first = (channels // 3) * 3
    return tl.where(channels < (D // 3) * 3, first + (channels - first + STEP) % 3, channels)


@triton.jit
def coefficient(channels, TERM: tl.constexpr, SIGN: tl.constexpr, D: tl.constexpr):
    """Return the factor of a term of the determinant form at each channel of the virtual query."""
    whole = channels < (D // 3) * 3
    return tl.where(whole, SIGN * 1.0, 1.0) if TERM == 0 else tl.where(whole, SIGN * -1.0, 0.0)


@triton.jit
def virtual_queries(q, k, q_offsets, k_offsets, valid, scale, SIGN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Return scale * (the product, or the cross product if SIGN != 0, of query and short key) of each row."""
    channels = tl.arange(0, BD)
    if SIGN == 0:
        a = load_rows(k, k_offsets, valid, channels, D, BD).to(tl.float32)
        b = load_rows(q, q_offsets, valid, channels, D, BD).to(tl.float32)
        u = a * b
    else:
        n = turned(channels, 1, D)
        p = turned(channels, 2, D)
        a = load_rows(k, k_offsets, valid, n, D, BD).to(tl.float32)
        b = load_rows(q, q_offsets, valid, p, D, BD).to(tl.float32)
        u = coefficient(channels, 0, SIGN, D)[None, :] * a * b
        a = load_rows(k, k_offsets, valid, p, D, BD).to(tl.float32)
        b = load_rows(q, q_offsets, valid, n, D, BD).to(tl.float32)
        u += coefficient(channels, 1, SIGN, D)[None, :] * a * b
    return narrowed(u * scale, q.dtype.element_ty)


@triton.jit
def reach(i0, tokens, long, BI: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return where the long keys of BI queries begin, where no mask is needed from and to, and where they end.

    The first stretch is walked in tiles of EDGE >= BI - 1 keys, because only the first BI - 1 keys may be too old for
    some query; with documents every tile needs a mask.
    """
    begin = tl.maximum(i0 - long + 1, 0)
    end = tl.minimum(i0 + BI, tokens)
    if DOCUMENTS:
        clear_begin = begin
        clear_end = begin
    else:
        clear_begin = begin
        if BI > 1:
            clear_begin = tl.where(i0 - long + BI > 0, begin + EDGE, begin)
        clear_end = clear_begin + tl.maximum(i0 + 1 - clear_begin, 0) // BN * BN
    return begin, clear_begin, clear_end, end


@triton.jit
def allowed_pairs(i, j, own, documents, tokens, long, DOCUMENTS: tl.constexpr):
    """Return which long keys j the rows may read; i and own lie along one axis, j along the other."""
    allowed = (j <= i) & (j > i - long)
    if DOCUMENTS:
        allowed = allowed & (own == tl.load(documents + j, mask=j < tokens, other=-1))
    return allowed


@triton.jit
def gathered(x, group_of_row, GROUPS: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr):
    """Return (GROUPS, columns) the sums of the rows of x by group: a product with a matrix of zeros and ones.

    The matrix unit does it several times as fast as shuffles; x is rounded to `dtype` before, like every operand.
    The assembler may drop such a product where it unrolls a loop around it: see docs/kernels.md before changing this.
    """
    belongs = (tl.arange(0, GROUPS)[:, None] == group_of_row[None, :]).to(tl.float32)
    return product(belongs.to(dtype), narrowed(x, dtype), None, PRECISION)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Return x in `dtype`, rounded to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # The interpreter cuts: round in the bits.
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
