"""Operators of functions that launch kernels, shown on one that multiplies on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trivium.ops.simplicial.operators import Operator, check_rows


def _run(x: Tensor, y: Tensor, times: int) -> Tensor:
    return x * y * times


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.times = inputs[2]


def _gradients(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    return dz * y * ctx.times, dz * x * ctx.times, None


product = Operator("test_product", _run, lambda x, *rest: torch.empty_like(x), _gradients, _remember)


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, generator=generator, requires_grad=True) for _ in range(2))
    return x, y


def test_it_is_registered_as_torch_wants():
    torch.library.opcheck(product.op, (*draw(), 3))


def test_a_plain_call_equals_the_registered_one_in_value_and_gradient():
    inputs = draw()
    straight, registered = product(*inputs, 3), product.op(*inputs, 3)
    assert torch.equal(straight, registered)
    for x, y in zip(*(torch.autograd.grad(z.sum(), inputs) for z in (straight, registered)), strict=True):
        assert torch.equal(x, y)
    assert not product(*(x.detach() for x in inputs), 3).requires_grad


def test_gradients_of_gradients_are_refused_not_wrong():
    x, y = draw()
    (dx,) = torch.autograd.grad(product(x, y, 3).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_compiled_graph_holds_the_operator():
    found = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, y = draw()
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: product(a, b, 3) + 1, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x, y), product(x, y, 3) + 1)
    assert any("test_product" in target for target in found)


def test_a_tensor_without_data_gets_the_shape_alone():
    with FakeTensorMode() as mode:
        fake = torch.empty(3, 4)
        assert product(fake, fake, 3).shape == (3, 4)
    outside = mode.from_tensor(torch.ones(3, 4))
    assert product(outside, outside, 3).shape == (3, 4)


def test_a_head_width_that_is_not_contiguous_is_refused_by_name():
    good, turned = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3).transpose(2, 3)
    with pytest.raises(ValueError, match=r"k1: stride 3 of the head width; backend hopper needs 1: give k1\.contig"):
        check_rows("hopper", q=good, k1=turned)
