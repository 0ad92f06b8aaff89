"""Cross-entropy over a large vocabulary: every backend against the formula, and a training step that takes it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import triton_cases as cases
from trivium.ops.vocabulary_loss import chunks, vocabulary_loss
from trivium.registry import UserError

SHAPES = [(7, 5, 130), (5, 16, 500), (1, 3, 64), (67, 8, 65)]


def draw(rows: int, width: int, symbols: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, symbols))
    targets = torch.randint(symbols, (rows,), generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), targets, torch.rand(rows, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2**26], ids=["row by row", "at once"])
def test_chunks_of_any_size_give_the_loss_and_gradients_of_all_logits(
    shape: tuple[int, int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunks, "CHUNK_BYTES_CPU", chunk)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 1)
    x, weight, targets, weights = draw(*shape)
    found, wanted = (vocabulary_loss(x, weight, targets, weights, backend=name) / 3 for name in ("torch", "reference"))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for mine, true in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    pytest.importorskip("triton")
    if cases.GPU:
        yield lambda function, *arguments: cases.call(None, function, *arguments)
        return
    with cases.interpreter() as pool:
        yield lambda function, *arguments: cases.call(pool, function, *arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_gives_the_loss_and_gradients_of_the_formula(run: Any, shape: tuple[int, int, int]):
    errors = run(cases.loss_errors, *shape)
    assert all(error < 1e-5 for error in errors.values()), errors


LOW_CASES = [("torch", (64, 32, 4096))]
if cases.GPU:
    LOW_CASES += [(name, shape) for name in ("torch", "triton") for shape in ((700, 64, 50_257), (64, 32, 4096))]


@pytest.mark.parametrize(("backend", "shape"), LOW_CASES, ids=str)
def test_in_bfloat16_only_what_rounding_the_logits_does_is_lost(backend: str, shape: tuple[int, int, int]):
    """Logits of a standard deviation of 8 lose up to 1.5 % of the gradient to their rounding, whoever rounds them."""
    mine, plain = (cases.loss_errors(*shape, torch.bfloat16, name) for name in (backend, "reference"))
    assert all(mine[name] < 1.02 * plain[name] for name in ("x", "weight")), (mine, plain)
    if shape == (64, 32, 4096):
        assert all(error < 1e-2 for error in mine.values()), mine
    assert mine["loss"] < 5e-4, mine  # a mean of roundings, which fall out differently in each product
    errors = cases.loss_errors(*shape, torch.bfloat16, backend, spread=1.0)
    assert all(error < 3e-3 for error in errors.values()), errors


@pytest.mark.parametrize("frozen", [0, 1], ids=["x", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen: int):
    x, weight, targets, weights = draw(7, 5, 130)
    both = torch.autograd.grad(vocabulary_loss(x, weight, targets, weights, backend="torch"), (x, weight))
    tensors: Any = [x, weight]
    tensors[frozen] = tensors[frozen].detach()
    (one,) = torch.autograd.grad(vocabulary_loss(*tensors, targets, weights, backend="torch"), tensors[1 - frozen])
    assert torch.equal(one, both[1 - frozen])


def test_under_autocast_it_computes_as_the_head_would():
    x, weight, targets, weights = (each.detach() for each in draw(70, 16, 130))
    leaves: Any = [x.float().requires_grad_(), weight.float().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [vocabulary_loss(*leaves, targets, weights, backend=name) for name in ("torch", "reference")]
    found, wanted = (torch.autograd.grad(loss, leaves) for loss in losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    for mine, true in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - true).norm() / true.norm()) < 1e-2


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's compiler imports it
def test_it_compiles_whole():
    def loss(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return vocabulary_loss(x, weight, targets, weights, backend="torch") / 2

    tensors = draw(7, 5, 130)
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(function(*tensors), tensors[:2]) for function in (compiled, loss)]
    for mine, true in zip(*grads, strict=True):
        torch.testing.assert_close(mine, true)


def test_shapes_that_do_not_fit_and_backends_that_are_missing_are_refused():
    x, weight, targets, weights = draw(7, 5, 130)
    with pytest.raises(ValueError, match=r"expected \(N, D\), \(V, D\)"):
        vocabulary_loss(x, weight[:, :4], targets, weights)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        vocabulary_loss(x, weight, targets[:6], weights)
    with pytest.raises(ValueError, match="one dtype"):
        vocabulary_loss(x.float(), weight, targets, weights)
    if not cases.GPU:
        with pytest.raises(UserError, match="'triton' is missing"):
            vocabulary_loss(x.float(), weight.float(), targets, weights, backend="triton")
