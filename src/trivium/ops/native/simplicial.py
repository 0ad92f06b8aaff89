"""A step of generation in 2-simplicial attention by the kernel in C."""

import torch
from torch import Tensor

from trivium.ops.native.kernels import call


def native(
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
    """Return o (B, 1, H, D); arguments as in `simplicial_decode`, checked there, of one token a row."""
    rows, _, heads, width = q.shape
    given = [each.contiguous() for each in (q, k1, k2, v1, v2, lengths.to(torch.int64))]
    out = torch.empty_like(given[0])
    call(
        "simplicial_step",
        q.dtype,
        *(each.data_ptr() for each in (*given, out)),
        *(rows, heads, k1.shape[2], width, k1.shape[1], k2.shape[1], window1, window2),
        scale,
        torch.get_num_threads(),
    )
    return out
