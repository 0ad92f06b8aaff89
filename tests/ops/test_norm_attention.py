"""Norm, projection and attention from a cache in one: each backend against the formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ops import fused_cases, triton_cases
from tests.ops.test_fused_linear import run as run
from trivium.ops import dispatch
from trivium.ops.norm_attention import norm_attention

# Rows, tokens of a prompt, slots, heads, key heads, head width, numbers of a token, norm, whether rows are finished,
# window.
SHAPES = [
    (5, 4, 7, 4, 2, 16, 32, "layernorm", True, None),
    (20, 3, 6, 2, 2, 8, 24, "rmsnorm", False, 2),
    (3, 1, 5, 2, 1, 4, 16, "layernorm", True, None),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parts_equal_the_formula_and_leave_the_same_cache(shape: tuple[Any, ...]):
    errors = fused_cases.attention_errors(*shape, torch.float64, "torch")
    assert all(error < 1e-12 for error in errors.values()), errors


@pytest.mark.parametrize(("shape", "in_one"), list(zip(SHAPES, (9, 20, 0), strict=True)), ids=str)
def test_kernels_equal_the_formula_as_closely_as_float16_can_and_read_no_slot_that_is_empty(
    run: Callable[..., Any], shape: tuple[Any, ...], in_one: int
):
    errors = run(fused_cases.attention_errors, *shape, torch.float16, "triton", in_one)
    assert all(error < 1e-3 for error in errors.values()), errors
    assert errors["length"] == 0


@pytest.mark.skipif(not triton_cases.GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        *((rows, 10, 15, 8, 8, 32, 256, "layernorm", True, None) for rows in (1, 100, 1000, 10_000)),
        (300, 33, 64, 4, 2, 64, 512, "rmsnorm", True, None),
        (300, 64, 64, 6, 3, 40, 240, "layernorm", False, 9),
    ],
    ids=str,
)
def test_every_size_equals_the_formula_on_a_gpu(shape: tuple[Any, ...], dtype: torch.dtype):
    errors = fused_cases.attention_errors(*shape, dtype, "triton")
    assert all(error < (2e-2 if dtype == torch.bfloat16 else 3e-3) for error in errors.values()), errors
    assert errors["length"] == 0


def test_a_prompt_that_the_cache_cannot_hold_is_refused():
    ring = torch.zeros(2, 3, 1, 4)
    given = torch.nn.LayerNorm(4), torch.zeros(12, 4), None, ring, ring.clone(), torch.zeros(2).long(), None
    with torch.no_grad():
        with pytest.raises(ValueError, match="4 tokens a row, empty=True, and 3 slots"):
            norm_attention(torch.zeros(2, 4, 4), *given, empty=True)
        with pytest.raises(ValueError, match="2 tokens a row, empty=False"):
            norm_attention(torch.zeros(2, 2, 4), *given)


def test_what_the_kernels_cannot_do_is_refused():
    refuses = dispatch._registered["norm_attention"]["triton"].refuses
    assert refuses({}) is None
    assert "gradients are on" in (refuses({"gradient": True}) or "")
    assert "float64" in (refuses({"dtype": torch.float64}) or "")
    assert "another dtype" in (refuses({"one dtype": "no"}) or "")
    assert "norm Identity" in (refuses({"norm": "Identity"}) or "")
    assert "more than 64 tokens" in (refuses({"fits": "no"}) or "")
    assert "by name" in (refuses({"parts": "named"}) or "")
