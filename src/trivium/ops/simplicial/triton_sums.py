"""What becomes of the sums in float32 that the backward kernels leave: gathered from workspaces, or narrowed."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import triton
import triton.language as tl

from trivium.ops.simplicial.triton_tiles import narrowed


@triton.jit
def gather_kernel(
    workspace, out, first, tokens, kv_heads, short,
    D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Write each short key's gradient, the sum over the tiles of queries that read it, in their order."""
    p = tl.program_id(0) * BT + tl.arange(0, BT)
    row = first + tl.program_id(1)
    channels = tl.arange(0, BD)
    span = short + BI - 1
    workspace += tl.program_id(1).to(tl.int64) * tl.cdiv(tokens, BI) * span * D
    total = tl.zeros((BT, BD), tl.float32)
    for step in range(tl.cdiv(span, BI) + 1):
        tile = p // BI + step
        slot = p - tile * BI + short - 1
        mask = ((tile * BI < tokens) & (slot >= 0))[:, None] & (channels < D)[None, :]
        at = (tile.to(tl.int64) * span + slot) * D
        total += tl.load(workspace + at[:, None] + channels[None, :], mask=mask, other=0.0)
    b = (row // kv_heads).to(tl.int64)
    mask = (p < tokens)[:, None] & (channels < D)[None, :]
    at = ((b * tokens + p) * kv_heads + row % kv_heads)[:, None] * D + channels[None, :]
    tl.store(out + at, narrowed(total, out.dtype.element_ty), mask=mask)


@triton.jit
def narrow_kernel(sums, a, b, c, d, count, BLOCK: tl.constexpr):
    """Write the four parts of sums (4, count), in float32, to a, b, c and d in their own type."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    x = narrowed(tl.load(sums + part * count.to(tl.int64) + at, mask=at < count), a.dtype.element_ty)
    if part == 0:
        tl.store(a + at, x, mask=at < count)
    elif part == 1:
        tl.store(b + at, x, mask=at < count)
    elif part == 2:
        tl.store(c + at, x, mask=at < count)
    else:
        tl.store(d + at, x, mask=at < count)
