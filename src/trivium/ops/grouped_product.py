"""Products of rows that are sorted by group with the matrix of their group: what a mixture of experts computes.

Shapes: N rows, E groups, K width in, F width out. No row is ever dropped, whatever the sizes of the groups.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from trivium.ops import dispatch

__all__ = ["count_flops", "grouped_product"]


def grouped_product(x_NK: Tensor, weight_EFK: Tensor, counts_E: Tensor, *, backend: str = "auto") -> Tensor:
    """Return y (N, F): the first counts[0] rows of x times weight[0].T, the next counts[1] times weight[1].T ...

    `counts_E` (int64) sum to N. Products are made in autocast's dtype where that is on. Backends: "reference" (a loop
    over the groups) and "torch", which on a GPU asks the device for no count, so that it can be captured. Raises
    ValueError for shapes that do not fit and UserError for a backend that is missing.
    """
    if x_NK.shape[1] != weight_EFK.shape[2] or counts_E.shape != weight_EFK.shape[:1]:
        shapes = [tuple(x.shape) for x in (x_NK, weight_EFK, counts_E)]
        raise ValueError(f"x, weight, counts: expected (N, K), (E, F, K), (E,), got {shapes}")
    device = x_NK.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_NK, weight_EFK = x_NK.to(dtype), weight_EFK.to(dtype)
    facts = (("dtype", x_NK.dtype), ("aligned", x_NK.shape[1] % 8 == 0 and weight_EFK.shape[1] % 8 == 0))
    name = dispatch.choose("grouped_product", backend, device, facts)
    fast = name == "torch" and device == "cuda"
    return _product(x_NK, weight_EFK, counts_E, fast and _fits(dict(facts)), fast)


def _fits(facts: Mapping[str, Any]) -> bool:
    return facts["dtype"] == torch.bfloat16 and facts["aligned"]


def _remark(facts: Mapping[str, Any]) -> str | None:
    return (
        None
        if not facts or _fits(facts)
        else "not bfloat16 of whole 16 bytes: each group's product is made of all rows"
    )


def _forward(x: Tensor, weight: Tensor, counts: Tensor, grouped: bool, still: bool) -> Tensor:
    """Return y; `grouped` by one kernel for all groups, `still` without reading the counts on the host."""
    if grouped:
        return grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).int())
    if still:
        group_N = _groups(counts, len(x))
        y = x.new_zeros(len(x), weight.shape[1])
        for index, matrix in enumerate(weight):
            y = torch.where((group_N == index)[:, None], linear(x, matrix), y)
        return y
    return torch.cat([linear(part, matrix) for part, matrix in zip(x.split(counts.tolist()), weight, strict=True)])


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, grouped: bool, still: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    dy = dy.contiguous()
    if grouped:
        offsets = counts.cumsum(0).int()
        return grouped_mm(dy, weight, offs=offsets), grouped_mm(dy.T, x, offs=offsets)
    if still:
        group_N = _groups(counts, len(x))
        parts = [dy * (group_N == index)[:, None] for index in range(len(weight))]
        dx = sum((part @ matrix for part, matrix in zip(parts, weight, strict=True)), torch.zeros_like(x))
        return dx, torch.stack([part.T @ x for part in parts])
    sizes = counts.tolist()
    pairs = list(zip(dy.split(sizes), x.split(sizes), weight, strict=True))
    return torch.cat([d @ matrix for d, _, matrix in pairs]), torch.stack([d.T @ part for d, part, _ in pairs])


def _groups(counts: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(counts.cumsum(0), torch.arange(rows, device=counts.device), right=True)


_product = torch.library.custom_op("trivium::grouped_product", _forward, mutates_args=())
_gradients = torch.library.custom_op("trivium::grouped_product_backward", _backward, mutates_args=())


@_product.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, grouped: bool, still: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_gradients.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, grouped: bool, still: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.ways = inputs[3:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = _gradients(dy, *ctx.saved_tensors, *ctx.ways)
    return dx, dweight, None, None, None


_product.register_autograd(_differentiate, setup_context=_setup_context)


@cache
def count_flops() -> None:
    """Let PyTorch's FlopCounterMode count this operator: 2 FLOPs for each multiply-add of a row, however it is made."""
    # Importing the counter imports Triton, half a second that only models with experts should wait for.
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.trivium.grouped_product)(_flops)


def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


dispatch.register("grouped_product", "reference", dispatch.Backend(lambda: grouped_product))
dispatch.register(
    "grouped_product",
    "torch",
    dispatch.Backend(
        lambda: grouped_product,
        suits=lambda device_type: "one product for each group" if device_type == "cpu" else "PyTorch's grouped product",
        remark=_remark,
    ),
)
