"""A step of generation in attention by the kernels in C."""

from typing import Any

import torch
from torch import Tensor

from trivium.ops.native.kernels import call


def native(
    heads_BNK: Tensor,
    keys_BSGK: Tensor,
    values_BSGK: Tensor,
    length_B: Tensor,
    added_B: Tensor | None,
    held: Any,
    attention_backend: str,
) -> Tensor:
    """Return o (B, H, K); arguments as in `cached_step`."""
    if not (keys_BSGK.is_contiguous() and values_BSGK.is_contiguous() and length_B.is_contiguous()):
        raise ValueError("keys, values and lengths: backend native needs contiguous ones")
    heads_BNK = heads_BNK.contiguous()
    rows, packed, width = heads_BNK.shape
    slots, kv_heads = keys_BSGK.shape[1:3]
    wanted = (rows, slots, kv_heads, width)
    if not (keys_BSGK.shape == values_BSGK.shape == wanted) or not slots or (packed - 2 * kv_heads) % kv_heads:
        raise ValueError(
            f"heads {tuple(heads_BNK.shape)}, keys {tuple(keys_BSGK.shape)} and values {tuple(values_BSGK.shape)}: "
            "rows, key heads and widths must be the same, and there must be a slot"
        )
    if not (keys_BSGK.dtype == values_BSGK.dtype == heads_BNK.dtype and length_B.dtype == torch.int64):
        raise ValueError("heads, keys and values: all must be of one dtype, and the lengths int64")
    if length_B.shape != (rows,) or (added_B is not None and added_B.shape != (rows,)):
        raise ValueError(f"lengths: expected {rows} of them")
    out_BHK = heads_BNK.new_empty(rows, packed - 2 * kv_heads, width)
    added_B = None if added_B is None else added_B.to(torch.int64).contiguous()
    call(
        "attention_step",
        heads_BNK.dtype,
        *(each.data_ptr() for each in (heads_BNK, keys_BSGK, values_BSGK, length_B)),
        None if added_B is None else added_B.data_ptr(),
        out_BHK.data_ptr(),
        *(rows, slots, packed - 2 * kv_heads, kv_heads, width),
        width**-0.5,
        torch.get_num_threads(),
    )
    length_B.add_(1 if added_B is None else added_B)
    return out_BHK
