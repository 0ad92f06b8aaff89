"""Linear maps with their norm, activation and residual add: each backend against the formula in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.ops import fused_cases, triton_cases
from trivium.ops import dispatch
from trivium.ops.fused_linear import linear_add, norm_feedforward, norm_linear
from trivium.registry import UserError

# Rows (three tokens each), numbers in, numbers out, norm, activation, whether there is a bias.
SHAPES = [
    (1, 16, 11, "layernorm", "none", False),
    (7, 40, 33, "rmsnorm", "gelu", True),
    (100, 24, 50, "layernorm", "gelu_new", True),
]
GPU_SHAPES = [
    (rows, inner, outer, "layernorm", "gelu_new", True)
    for rows in (1, 50, 333, 2000, 40_000)
    for inner, outer in ((256, 768), (256, 1024), (1024, 256), (256, 14), (200, 120))
]
on_a_gpu = pytest.mark.skipif(not triton_cases.GPU, reason="needs a GPU")


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    pytest.importorskip("triton")
    if triton_cases.GPU:
        yield lambda function, *arguments: triton_cases.call(None, function, *arguments)
        return
    with triton_cases.interpreter() as pool:
        yield lambda function, *arguments: triton_cases.call(pool, function, *arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parts_of_pytorch_equal_the_formula(shape: tuple[Any, ...]):
    errors = fused_cases.linear_errors(*shape, torch.float64, "torch")
    assert all(error < 1e-12 for error in errors.values()), errors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_kernels_equal_the_formula_as_closely_as_float16_can(run: Callable[..., Any], shape: tuple[Any, ...]):
    errors = run(fused_cases.linear_errors, *shape, torch.float16, "triton")
    assert all(error < 1e-3 for error in errors.values()), errors


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_every_tiling_equals_the_formula_on_a_gpu(shape: tuple[Any, ...], dtype: torch.dtype):
    errors = fused_cases.linear_errors(*shape, dtype, "triton")
    assert all(error < (1e-2 if dtype == torch.bfloat16 else 1e-3) for error in errors.values()), errors


def test_the_norm_and_the_library_equal_the_formula_as_closely_as_float16_can(run: Callable[..., Any]):
    for shape in ((7, 40, 70, "rmsnorm", "none", True), (30, 16, 65, "layernorm", "none", True)):
        assert run(fused_cases.library_error, *shape) < 1e-3


@on_a_gpu
def test_the_activation_of_the_library_is_the_form_with_tanh():
    x, weight = fused_cases.draw(5000, 64, dtype=torch.float16), fused_cases.draw(128, 64, dtype=torch.float16, seed=1)
    bias = fused_cases.draw(128, dtype=torch.float16, seed=2)
    found = torch._addmm_activation(bias, x, weight.T / 4, use_gelu=True).double()
    z = bias.double() + x.double() @ (weight.T / 4).double()
    errors = [float((found - nn.functional.gelu(z, approximate=form)).abs().mean()) for form in ("tanh", "none")]
    assert errors[0] < 0.8 * errors[1], errors


# Rows (three tokens each), width, hidden width, norm, activation, whether there are biases.
WHOLE = [(50, 16, 64, "layernorm", "gelu_new", True), (3, 32, 192, "rmsnorm", "gelu", False)]


@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_a_feedforward_in_two_parts_equals_the_formula(shape: tuple[Any, ...]):
    assert fused_cases.feedforward_error(*shape, torch.float64, "torch") < 1e-12


@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_a_feedforward_in_one_kernel_equals_the_formula_as_closely_as_float16_can(
    run: Callable[..., Any], shape: tuple[Any, ...]
):
    assert run(fused_cases.feedforward_error, *shape, torch.float16, "triton") < 1e-3


@on_a_gpu
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("rows", [1, 333, 40_000])
def test_a_feedforward_in_one_kernel_equals_the_formula_on_a_gpu(rows: int, dtype: torch.dtype, least: float):
    for width, hidden, activation in ((256, 1024, "gelu_new"), (128, 320, "gelu"), (64, 256, "none")):
        error = fused_cases.feedforward_error(rows, width, hidden, "layernorm", activation, True, dtype, "triton")
        assert error < least, (width, hidden, activation, error)


def test_few_rows_or_named_parts_take_the_parts_and_a_kernel_that_cannot_says_why():
    refuses = dispatch._registered["norm_feedforward"]["triton"].refuses
    assert refuses({}) is None
    assert "hidden width in steps of 64" in (refuses({"fits": "no"}) or "")
    assert "asked for by name" in (refuses({"parts": "named"}) or "")
    assert "gradients are on" in (refuses({"gradient": True}) or "")
    slower = dispatch._registered["norm_feedforward"]["triton"].slower
    assert slower({"rows": "few"}) == "not more than 4096 rows"
    assert slower({}) is slower({"rows": "many"}) is None
    x, norm = torch.randn(5, 4), nn.LayerNorm(4)
    maps = torch.randn(8, 4), torch.randn(8), torch.randn(4, 8), torch.randn(4)
    with torch.no_grad():
        y = norm_feedforward(x, norm, *maps, "gelu")
        torch.testing.assert_close(y, x + nn.functional.gelu(norm(x) @ maps[0].T + maps[1]) @ maps[2].T + maps[3])
        assert "by name" not in dispatch.chosen()["norm_feedforward"]["reason"]
        with pytest.raises(UserError, match="backend 'triton'"):
            norm_feedforward(x, norm, *maps, "gelu", backend="triton")


def test_what_the_kernels_cannot_do_is_refused_and_auto_takes_pytorch():
    refuses = dispatch._registered["norm_linear"]["triton"].refuses
    assert refuses({}) is None
    assert "gradients are on" in (refuses({"gradient": True}) or "")
    assert "float32" in (refuses({"dtype": torch.float32}) or "")
    assert "another dtype" in (refuses({"one dtype": "no"}) or "")
    assert "wider than 1024" in (refuses({"wide": "yes"}) or "")
    x, norm, weight = torch.randn(2, 4), nn.LayerNorm(4), torch.randn(3, 4)
    with torch.no_grad(), pytest.raises(UserError, match="backend 'triton'"):
        norm_linear(x, norm, weight, backend="triton")
    with torch.no_grad():
        torch.testing.assert_close(norm_linear(x, norm, weight), norm(x) @ weight.T)
        torch.testing.assert_close(linear_add(x, weight, None, torch.ones(2, 3)), 1 + x @ weight.T)
