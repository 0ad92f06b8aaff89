"""One query a row over a cache: each backend against the formula, Triton's on a GPU or through its interpreter."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import triton_cases as cases
from trivium.ops import dispatch
from trivium.ops.cached_attention import cached_attention
from trivium.registry import UserError

# rows, slots, heads, key heads, width, slots in use (None: all)
SHAPES = [
    (3, 200, 4, 2, 24, [1, 200, 77]),
    (2, 64, 3, 3, 5, [64, 63]),
    (1, 1, 2, 1, 64, None),
    (2, 130, 6, 1, 16, [130, 65]),
    (1, 300, 2, 2, 32, None),
]


def draw(shape: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor | None]:
    """Return q, k, v, whose slots behind a row's count hold NaN, and the counts; heads lie apart in memory."""
    rows, slots, heads, kv_heads, width, used = shape
    generator = torch.Generator().manual_seed(slots)
    q = torch.randn(rows, heads, width, generator=generator)
    k, v = (torch.randn(rows, slots, kv_heads, 2 * width, generator=generator)[..., :width] for _ in range(2))
    count = None if used is None else torch.tensor(used)
    if count is not None:
        behind = torch.arange(slots) >= count[:, None]
        k, v = (x.masked_fill(behind[..., None, None], torch.nan) for x in (k, v))
    return [x.to(device, dtype) for x in (q, k, v)], None if count is None else count.to(device)


@torch.no_grad()
def error(shape: tuple[Any, ...], backend: str, dtype: torch.dtype, device: str) -> float:
    """Return the distance from the float64 formula, relative to its size, NaN in memory that nobody has written."""
    inputs, count = draw(shape, dtype, device)
    if backend != "triton":  # the mask of the others does not keep a NaN behind a weight of 0 away
        inputs = [x.nan_to_num() for x in inputs]
    with cases.settings():
        q, k, v = inputs
        found = cached_attention(q, k, v, count, backend=backend)
    q, k, v = (x.double().nan_to_num() for x in inputs)
    wanted = cached_attention(q, k, v, count, backend="reference")
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., float]]:
    pytest.importorskip("triton")
    if cases.GPU:
        yield error
        return
    with cases.interpreter() as pool:
        yield lambda *arguments: cases.call(pool, error, *arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_pytorchs_kernel_equals_the_formula(shape: tuple[Any, ...]):
    assert error(shape, "torch", torch.float64, "cpu") < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_shares_of_the_slots_join_to_the_formula_and_read_nothing_behind_the_count(
    run: Callable[..., float], shape: tuple[Any, ...]
):
    assert run(shape, "triton", torch.float32, cases.DEVICE) < 1e-5


@pytest.mark.skipif(not cases.GPU, reason="needs a GPU: long caches")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long_caches_equal_the_formula_on_a_gpu(dtype: torch.dtype):
    for shape in ((1, 40_000, 8, 8, 64, [39_999]), (16, 5_000, 8, 2, 128, list(range(1, 5_000, 313)))):
        assert error(shape, "triton", dtype, "cuda") < (1e-5 if dtype == torch.float32 else 1e-2)


def test_auto_leaves_what_no_gpu_has_checked():
    assert dispatch._decide("cached_attention", "auto", "cuda", {})[0] == "torch"


def test_a_call_with_gradients_is_refused_by_the_backend_that_has_none():
    pytest.importorskip("triton")
    (q, k, v), count = draw(SHAPES[0], torch.float32)
    with pytest.raises(UserError, match="triton"):
        cached_attention(q, k, v, count, backend="triton")
