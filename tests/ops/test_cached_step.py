"""One token written into a cache and attended from: each backend against the formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ops import fused_cases, triton_cases
from tests.ops.test_fused_linear import run as run
from trivium.ops import dispatch
from trivium.ops.cached_attention.step import cached_step, wider
from trivium.ops.native import support

# Rows, slots, heads, key heads, width, whether rows are finished.
SHAPES = [(5, 6, 4, 2, 16, True), (6, 18, 3, 3, 5, False), (5, 1, 2, 1, 8, True), (5, 40, 6, 3, 4, True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_by_its_parts_equals_the_formula_and_leaves_the_same_cache(shape: tuple[Any, ...]):
    errors = fused_cases.step_errors(*shape, torch.float64, "torch")
    assert all(error < 1e-12 for error in errors.values()), errors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_in_one_kernel_equals_the_formula_and_reads_no_slot_that_is_empty(
    run: Callable[..., Any], shape: tuple[Any, ...]
):
    errors = run(fused_cases.step_errors, *shape, torch.float32, "triton")
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("shape", [*SHAPES, (5, 33, 2, 2, 64, True)], ids=str)
def test_a_step_of_a_program_for_each_head_equals_the_formula_and_counts_each_token_once(
    run: Callable[..., Any], shape: tuple[Any, ...]
):
    errors = run(fused_cases.step_errors_by_head, *shape, torch.float32, "triton")
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.skipif(not triton_cases.GPU, reason="needs a GPU")
@pytest.mark.parametrize("rows", [128, 1000, 10_000])
def test_many_rows_on_a_gpu_have_a_program_for_each_head(rows: int):
    from trivium.ops.cached_attention import triton_step

    assert triton_step.by_head(rows, 15, 64)
    for shape in ((rows, 15, 4, 4, 64, True), (rows, 40, 6, 3, 80, False)):
        errors = fused_cases.step_errors(*shape, torch.bfloat16, "triton")
        assert all(error < 1e-2 for error in errors.values()), errors
        assert errors["length"] == 0


@pytest.mark.skipif(support.missing() is not None, reason="no C compiler")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_in_c_equals_the_formula_and_reads_no_slot_that_is_empty(
    shape: tuple[Any, ...], dtype: torch.dtype, least: float
):
    errors = fused_cases.step_errors(*shape, dtype, "native")
    assert all(error < least for error in errors.values()), errors


@pytest.mark.skipif(support.missing() is not None, reason="no C compiler")
@torch.no_grad()
def test_threads_share_the_heads_of_few_rows_and_change_no_bit():
    torch.manual_seed(0)
    heads, keys, values = torch.randn(2, 12, 8), torch.randn(2, 21, 3, 8), torch.randn(2, 21, 3, 8)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        rings = keys.clone(), values.clone()
        length = torch.tensor([7, 30])
        found.append((cached_step(heads, *rings, length, None, backend="native"), *rings, length))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][1], keys)


@pytest.mark.skipif(support.missing() is not None, reason="no C compiler")
@torch.no_grad()
def test_a_step_in_c_refuses_what_lies_elsewhere_than_it_thinks():
    def step(**changes: Any) -> None:
        ring = torch.zeros(2, 3, 1, 4)
        given = {"heads": torch.zeros(2, 4, 4), "keys": ring, "values": ring.clone(), "length": torch.zeros(2).long()}
        cached_step(*(given | changes).values(), None, backend="native")

    step()
    with pytest.raises(ValueError, match="rows, key heads and widths"):
        step(keys=torch.zeros(2, 3, 1, 8))
    with pytest.raises(ValueError, match="rows, key heads and widths"):
        step(keys=torch.zeros(2, 0, 1, 4), values=torch.zeros(2, 0, 1, 4))
    with pytest.raises(ValueError, match="contiguous"):
        step(keys=torch.zeros(2, 3, 1, 8)[..., ::2])
    with pytest.raises(ValueError, match="expected 2"):
        step(length=torch.zeros(1).long())
    with pytest.raises(ValueError, match="int64"):
        step(length=torch.zeros(2).int())


@pytest.mark.skipif(not triton_cases.GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        (1000, 18, 4, 4, 64, True),
        (7, 500, 8, 2, 128, True),
        (9, 513, 8, 8, 64, True),
        (3, 1024, 2, 2, 64, False),
    ],
    ids=str,
)
def test_steps_equal_the_formula_on_a_gpu(shape: tuple[Any, ...], dtype: torch.dtype):
    errors = fused_cases.step_errors(*shape, dtype, "triton")
    assert all(error < (1e-5 if dtype == torch.float32 else 1e-2) for error in errors.values()), errors


def test_what_the_kernel_cannot_do_is_refused():
    refuses = dispatch._registered["cached_step"]["triton"].refuses
    assert refuses({}) is None
    assert "gradients are on" in (refuses({"gradient": True}) or "")
    assert "1024 slots" in (refuses({"fits": "no"}) or "")
    assert "reference" in (refuses({"attention": "reference"}) or "")
    assert "another dtype" in (refuses({"one dtype": "no"}) or "")
    slower = dispatch._registered["cached_step"]["triton"].slower
    assert slower({"dtype": torch.float32, "long": "yes"}) is None
    assert slower({"dtype": torch.bfloat16, "long": "no"}) is None
    assert "128 slots of torch.bfloat16" in (slower({"dtype": torch.bfloat16, "long": "yes"}) or "")


def test_numbers_are_copied_eight_bytes_at_a_time_where_their_places_allow_it():
    whole = torch.randn(3, 5, 12, 8).bfloat16()
    for source, into, ratio in (
        (whole[:, :, 4:8], torch.zeros(3, 9, 4, 8).bfloat16()[:, 2:7], 4),
        (whole.float()[:, :, 4:8], torch.zeros(3, 9, 4, 8)[:, 2:7], 2),
        (whole.double()[:, :, 4:8], torch.zeros(3, 9, 4, 8).double()[:, 2:7], 1),
        (whole[..., 4:7], torch.zeros(3, 5, 12, 3).bfloat16(), 1),
        (whole[..., 1:5], torch.zeros(3, 5, 12, 4).bfloat16(), 1),
        (whole[..., ::2], torch.zeros(3, 5, 12, 4).bfloat16(), 1),
    ):
        wide, room = wider(source, into)
        assert wide.shape[-1] * ratio == source.shape[-1]
        room.copy_(wide)
        assert torch.equal(into, source)
