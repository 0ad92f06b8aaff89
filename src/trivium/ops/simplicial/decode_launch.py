"""Launch the Triton decode kernel, as an operator that torch.compile and CUDA graphs know."""

from typing import Any

import torch
from torch import Tensor

from trivium.ops.simplicial import operators
from trivium.ops.simplicial import triton_decode as kernels
from trivium.ops.simplicial.triton_launch import Tiles, power_of_two, sizes_for
from trivium.ops.simplicial.triton_support import interpreted


def tiles_for(*, width: int, group: int, short: int, wide: bool) -> Tiles:
    """Return the tiles for `group` query heads and `short` slots; `width` is padded, `wide` says 4-byte inputs."""
    rows, long, warps, stages = sizes_for(width=width, wide=wide)
    keys = min(power_of_two(short), rows)
    heads = min(power_of_two(group), rows // keys)
    # The matrix unit takes 16 rows at least.
    return Tiles(1, heads, max(keys, 16 // heads), long, warps, stages)


_decode_kernel: Any = kernels.decode_kernel  # whose launch syntax no type checker follows


def decode(
    q: Tensor,
    k_long: Tensor,
    v_long: Tensor,
    k_short: Tensor,
    v_short: Tensor,
    lengths: Tensor,
    long: int,
    short: int,
    scale: float,
    sign: int,
) -> Tensor:
    """Return o (B, T, H, D); `sign` as in `triton_launch.forward`."""
    rows, tokens, heads, width = q.shape
    kv_heads = k_long.shape[2]
    group, padded = heads // kv_heads, max(16, power_of_two(width))
    wide = q.dtype == torch.float32
    tiles = tiles_for(width=padded, group=group, short=k_short.shape[1], wide=wide)
    head_blocks = -(-group // tiles.heads)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [stride for x in (q, k_long, v_long, k_short, v_short) for stride in x.stride()[:3]]
    _decode_kernel[(tokens * head_blocks, rows * kv_heads)](
        *(q, k_long, v_long, k_short, v_short, lengths, o, *strides),
        *(tokens, heads, kv_heads, group, head_blocks, k_long.shape[1], k_short.shape[1], long, short, scale),
        D=width,
        BD=padded,
        BG=tiles.heads,
        BK=tiles.short,
        BN=tiles.long,
        CHUNKS=-(-k_short.shape[1] // tiles.short),
        SIGN=sign,
        PRECISION="ieee" if wide else "tf32",
        **tiles.options,
    )
    return o


_decode = operators.Operator("simplicial_triton_decode", decode, operators.output_fake)


def triton_decode(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    lengths: Tensor,
    *,
    window1: int,
    window2: int,
    scale: float,
    form: str,
) -> Tensor:
    """Return o (B, T, H, D); arguments as in `simplicial_decode`, already checked, and none that are refused."""
    if q.device.type == "cpu" and not interpreted():
        raise ValueError("q: on cpu; backend triton needs tensors on a GPU")
    operators.check_rows("triton", q=q, k1=k1, k2=k2, v1=v1, v2=v2)
    sign = 1 if form == "determinant" else 0
    rings = (k1, v1, k2, v2, lengths, window1, window2)
    if k1.shape[1] < k2.shape[1]:
        rings, sign = (k2, v2, k1, v1, lengths, window2, window1), -sign
    return _decode(q, *rings, scale, sign)
