from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trivium.ops import grouped_product as module
from trivium.ops.grouped_product import count_flops, grouped_product

GPU = torch.cuda.is_available()
COUNTS = [[3, 0, 4, 1], [8, 0, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2]]


def draw(counts: list[int], inner: int = 8, outer: int = 16, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), inner, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(counts), outer, inner, generator=generator, dtype=torch.float64)
    made = torch.tensor(counts, device=device)
    return x.to(device).requires_grad_(), weight.to(device).requires_grad_(), made


def wanted(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    group = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
    return torch.einsum("nk,nfk->nf", x, weight[group])


def check(
    tensors: tuple[Tensor, ...], dtype: torch.dtype, tolerance: float, ways: tuple[bool, bool] | None = None
) -> None:
    x, weight, counts = tensors
    narrow: Any = [each.detach().to(dtype).requires_grad_() for each in (x, weight)]
    true = wanted(x, weight, counts)
    slope = torch.randn_like(true)
    y = module._product(*narrow, counts, *ways) if ways else grouped_product(*narrow, counts)
    found = [y.detach(), *torch.autograd.grad(y, narrow, slope.to(dtype))]
    expected = [true.detach(), *torch.autograd.grad(true, (x, weight), slope)]
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape
        assert float((mine.double() - right).norm()) <= tolerance * float(right.norm())


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("still", [False, True], ids=["counts are read", "counts stay on the device"])
def test_each_group_is_multiplied_by_its_own_matrix(counts: list[int], still: bool):
    check(draw(counts), torch.float64, 1e-14, (False, still))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("counts", [*COUNTS, [700, 3, 0, 321]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_it_is_right_and_can_be_captured(counts: list[int], dtype: torch.dtype):
    tensors = draw(counts, 64, 32, "cuda")
    check(tensors, dtype, 1e-2 if dtype == torch.bfloat16 else 1e-5)
    x, weight, made = (each.detach() for each in tensors)
    x, weight = x.to(dtype), weight.to(dtype)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = grouped_product(x, weight, made)
    graph.replay()
    assert torch.equal(y, grouped_product(x, weight, made))


def test_its_flops_are_those_of_the_rows_products():
    x, weight, counts = draw([3, 0, 4, 1])
    count_flops()
    with FlopCounterMode(display=False) as counter:
        grouped_product(x, weight, counts)
    assert counter.get_total_flops() == 2 * 8 * 8 * 16


def test_shapes_that_do_not_fit_are_refused():
    x, weight, counts = draw([3, 0, 4, 1])
    with pytest.raises(ValueError, match=r"expected \(N, K\), \(E, F, K\), \(E,\)"):
        grouped_product(x, weight, counts[:2])
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        grouped_product(x, weight[..., :7], counts)
