"""Rows of a table, each as often as it is asked for. Shapes: U rows, (...) places."""

from typing import Any

import torch
from torch import Tensor


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dtype = grads[0].dtype
        wide = dtype if dtype == torch.float64 else torch.float32  # hundreds are summed up
        sums = torch.zeros(ctx.shape, dtype=wide, device=grads[0].device)
        return sums.index_add(0, index, grads[0].to(wide)).to(dtype), None


def repeat_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows[index] (..., N) of rows (U, N) and index (...), int64; its gradient is summed in float32 or wider.

    Raises ValueError for rows that are no matrix, IndexError for an index outside of them.
    """
    if rows.ndim != 2:
        raise ValueError(f"repeat_rows: rows are {tuple(rows.shape)}; needed is (U, N)")
    return _Repeat.apply(rows, index.flatten()).unflatten(0, index.shape)
