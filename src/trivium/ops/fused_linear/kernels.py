"""The Triton kernels of a norm, a linear map and an activation in one, and of a linear map that adds to a stream.

Shapes: M rows, D numbers that a row has, N that it gets; the weight is (N, D).
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def norm_linear_kernel(
    x, gamma, beta, weight, bias, y, rows, outer, eps,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y (M, N) = activation(norm(x) weight^T + bias) for BM rows and TILES times BN columns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    at = m.to(tl.int64)[:, None]
    h = tl.load(x + at * D + d[None, :], mask=(m < rows)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    if CENTRED:
        h = tl.where((d < D)[None, :], h - (tl.sum(h, 1) / D)[:, None], 0.0)
    h = h * tl.rsqrt(tl.sum(h * h, 1) / D + eps)[:, None]
    h = h * tl.load(gamma + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        h = h + tl.load(beta + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    h = h.to(weight.dtype.element_ty)
    for tile in range(TILES):
        n = (tl.program_id(1) * TILES + tile) * BN + tl.arange(0, BN)
        w = tl.load(weight + n[:, None] * D + d[None, :], mask=(n < outer)[:, None] & (d < D)[None, :], other=0.0)
        z = tl.dot(h, tl.trans(w), input_precision=PRECISION)
        if BIASED:
            z += tl.load(bias + n, mask=n < outer, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == 1:
            z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
        if ACTIVATION == 2:
            z = 0.5 * z * (1 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
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
