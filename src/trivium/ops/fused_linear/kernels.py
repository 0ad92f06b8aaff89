"""The Triton kernels of a norm, a linear map and an activation in one, of a linear map that adds to a stream, and of a
block's position-wise half.

Shapes: M rows, D numbers that a row has, N that it gets; the weight is (N, D). QUICK takes the chip's own tanh, whose
error of 2^-11 is less than 16 bits keep.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl


@triton.jit
def _tanh(x, QUICK: tl.constexpr):
    if QUICK:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1 - 2 / (1 + tl.exp(2 * x))
    return y


@triton.jit
def _activation(z, ACTIVATION: tl.constexpr, QUICK: tl.constexpr):
    if ACTIVATION == 1:
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == 2:
        half = 0.5 * z
        z = half + half * _tanh(z * (0.7978845608028654 + 0.035677408136300125 * (z * z)), QUICK)
    return z


@triton.jit
def _normed(
    x, gamma, beta, m, rows, eps, D: tl.constexpr, BD: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    at = m.to(tl.int64)[:, None]
    h = tl.load(x + at * D + d[None, :], mask=(m < rows)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    if CENTRED:
        h = tl.where((d < D)[None, :], h - (tl.sum(h, 1) / D)[:, None], 0.0)
    h = h * tl.rsqrt(tl.sum(h * h, 1) / D + eps)[:, None]
    h = h * tl.load(gamma + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        h = h + tl.load(beta + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit
def norm_kernel(
    x, gamma, beta, bias, y, moved, rows, eps,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CENTRED: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Write y (M, D) = norm(x) for BM rows and, with MOVED, moved = x + bias."""
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    h = _normed(x, gamma, beta, m, rows, eps, D, BD, CENTRED).to(y.dtype.element_ty)
    at, inside = m.to(tl.int64)[:, None] * D + d[None, :], (m < rows)[:, None] & (d < D)[None, :]
    tl.store(y + at, h, mask=inside)
    if MOVED:
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(moved + at, z.to(moved.dtype.element_ty), mask=inside)


@triton.jit
def norm_linear_kernel(
    x, gamma, beta, weight, bias, y, rows, outer, eps,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    QUICK: tl.constexpr,
):  # fmt: skip
    """Write y (M, N) = activation(norm(x) weight^T + bias) for BM rows and TILES times BN columns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    at = m.to(tl.int64)[:, None]
    if TILES == 1 and BM * BN <= 4096:  # the weights are on their way while the norm is computed
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        w = tl.load(weight + n[:, None] * D + d[None, :], mask=(n < outer)[:, None] & (d < D)[None, :], other=0.0)
    h = _normed(x, gamma, beta, m, rows, eps, D, BD, CENTRED).to(weight.dtype.element_ty)
    for tile in range(TILES):
        if TILES > 1 or BM * BN > 4096:
            n = (tl.program_id(1) * TILES + tile) * BN + tl.arange(0, BN)
            w = tl.load(weight + n[:, None] * D + d[None, :], mask=(n < outer)[:, None] & (d < D)[None, :], other=0.0)
        z = tl.dot(h, tl.trans(w), input_precision=PRECISION)
        if BIASED:
            z += tl.load(bias + n, mask=n < outer, other=0.0).to(tl.float32)[None, :]
        z = _activation(z, ACTIVATION, QUICK)
        tl.store(y + at * outer + n[None, :], z.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < outer)[None, :])


@triton.jit
def linear_add_kernel(
    x, weight, bias, stream, y, rows, outer,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y (M, N) = stream + x weight^T + bias for BM rows and BN columns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at = m.to(tl.int64)[:, None]
    inside = (m < rows)[:, None] & (n < outer)[None, :]
    z = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, D, BK):
        mine, theirs = (m < rows)[:, None], (n < outer)[:, None]
        if D % BK:
            mine = mine & (k0 + k < D)[None, :]
            theirs = theirs & (k0 + k < D)[None, :]
        part = tl.load(x + at * D + (k0 + k)[None, :], mask=mine, other=0.0)
        w = tl.load(weight + n[:, None] * D + (k0 + k)[None, :], mask=theirs, other=0.0)
        z = tl.dot(part, tl.trans(w), z, input_precision=PRECISION)
    if BIASED:
        z += tl.load(bias + n, mask=n < outer, other=0.0).to(tl.float32)[None, :]
    z += tl.load(stream + at * outer + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at * outer + n[None, :], z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_feedforward_kernel(
    x, gamma, beta, into, into_bias, back, back_bias, y, rows, eps,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, QUICK: tl.constexpr,
):  # fmt: skip
    """Write y (M, D) = x + activation(norm(x) into^T + bias) back^T + bias for BM rows, BF of F hidden numbers at a
    time; `into` is (F, D), `back` (D, F), D a power of two and F a multiple of BF.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d, f = tl.arange(0, D), tl.arange(0, BF)
    h = _normed(x, gamma, beta, m, rows, eps, D, D, CENTRED).to(into.dtype.element_ty)
    z = tl.zeros((BM, D), tl.float32)
    for f0 in tl.range(0, F, BF):
        w = tl.load(into + (f0 + f)[:, None] * D + d[None, :])
        hidden = tl.dot(h, tl.trans(w))
        if BIASED:
            hidden += tl.load(into_bias + f0 + f).to(tl.float32)[None, :]
        hidden = _activation(hidden, ACTIVATION, QUICK).to(back.dtype.element_ty)
        w = tl.load(back + d[:, None] * F + (f0 + f)[None, :])
        z = tl.dot(hidden, tl.trans(w), z)
    if BIASED:
        z += tl.load(back_bias + d).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * D + d[None, :]
    inside = (m < rows)[:, None]
    z += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)
