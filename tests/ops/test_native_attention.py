"""Packed attention by its backends on a CPU. Shapes: B rows, T tokens, M queries, H query heads, J heads in all."""

import pytest
import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.packed_attention import packed_attention
from trivium.registry import UserError

AVAILABLE = [
    name for name, missing in dispatch.backends("packed_attention").items() if missing is None and name != "triton"
]
FAST = [name for name in AVAILABLE if name != "reference"]
# Rows, tokens, query heads, key/value heads, head width, window: vectors that end within a row, blocks of queries that
# a window begins in, and one token.
SIZES = [
    (2, 1, 2, 1, 16, None),
    (3, 12, 4, 4, 16, None),
    (2, 37, 4, 2, 13, 5),
    (1, 70, 2, 2, 33, 70),
    (2, 19, 3, 1, 5, 1),
]


def inputs(size: tuple, dtype: torch.dtype = torch.float64, queries: bool = True) -> Tensor:
    rows, tokens, heads, kv_heads, width, _ = size
    count = 2 * kv_heads + (heads if queries else 0)
    return torch.randn(rows, tokens, count, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def with_gradients(heads_BTJK: Tensor, others: tuple, size: tuple, backend: str) -> list[Tensor]:
    leaves = [heads_BTJK.clone().requires_grad_(), *(each.clone().requires_grad_() for each in others[:1])]
    alone = {"query_MHD": leaves[1], "places_M": others[1]} if others else {}
    o = packed_attention(leaves[0], size[3], size[5], backend=backend, **alone)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o.dtype)
    return [o.detach(), *torch.autograd.grad((o * weights).sum(), leaves)]


def assert_near(mine: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for tensor, wanted in zip(mine, expected, strict=True):
        assert float((tensor.double() - wanted).norm()) <= tolerance * max(float(wanted.norm()), 1.0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_a_backend_gives_the_output_and_gradients_of_the_reference(backend: str, size: tuple):
    expected = with_gradients(inputs(size), (), size, "reference")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        assert_near(with_gradients(inputs(size).to(dtype), (), size, backend), expected, tolerance)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_queries_that_come_alone_read_as_the_tokens_at_their_places_do(backend: str, size: tuple):
    rows, tokens, heads, kv_heads, _, window = size
    generator = torch.Generator().manual_seed(2)
    # In no order, and not from every row.
    places_M = torch.randperm(rows * tokens, generator=generator)[: max(rows * tokens // 3, 1)]
    everything_BTJK = inputs(size)
    query_MHK = everything_BTJK[:, :, :heads].flatten(0, 1)[places_M]
    rest_BTJK = everything_BTJK[:, :, heads:]
    mine = with_gradients(rest_BTJK, (query_MHK, places_M), size, backend)

    leaf = everything_BTJK.clone().requires_grad_()
    o = packed_attention(leaf, kv_heads, window, backend="reference").flatten(0, 1)[places_M]
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((o * weights).sum(), leaf)
    expected = [o.detach(), gradient[:, :, heads:], gradient[:, :, :heads].flatten(0, 1)[places_M]]
    assert_near(mine, expected, 1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_what_lies_behind_a_query_does_not_touch_it(backend: str):
    size = SIZES[1]
    before = inputs(size, torch.float32)
    after = before.clone()
    after[:, 9:] = 1e30
    mine, other = (packed_attention(each, 4, backend=backend) for each in (before, after))
    assert torch.equal(mine[:, :9], other[:, :9])


def test_logits_far_apart_give_weights_of_nought_and_one():
    size = (1, 9, 1, 1, 8, None)
    heads_BTJK = inputs(size, torch.float32)
    heads_BTJK[:, :, :2] *= 100
    for backend in FAST:
        o = packed_attention(heads_BTJK, 1, backend=backend)
        expected = packed_attention(heads_BTJK.double(), 1, backend="reference")
        torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_threads_do_not_change_the_result():
    size = (5, 12, 4, 4, 16, None)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(inputs(size, torch.float32), (), size, "auto"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


@pytest.mark.parametrize("place", [-1, 36])
@pytest.mark.parametrize("backend", FAST)
def test_a_place_outside_the_tokens_is_refused(backend: str, place: int):
    query_MHK, places_M = torch.zeros(2, 4, 16, dtype=torch.float64), torch.tensor([3, place])
    with pytest.raises(IndexError):
        packed_attention(inputs(SIZES[1], queries=False), 4, query_MHD=query_MHK, places_M=places_M, backend=backend)


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("backend", FAST)
def test_no_rows_and_no_queries_are_none(backend: str, rows: int):
    assert with_gradients(inputs((rows, 3, 2, 1, 8, None)), (), (0, 0, 2, 1, 8, None), backend)[0].shape[0] == rows
    rest_BTJK = inputs((rows, 3, 2, 1, 8, None), queries=False)
    none = (torch.zeros(0, 2, 8, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    o, gradient, _ = with_gradients(rest_BTJK, none, (0, 0, 2, 1, 8, None), backend)
    assert o.shape == (0, 2, 8)
    assert not gradient.any()


@pytest.mark.parametrize("backend", FAST)
def test_gradients_are_those_of_finite_differences_also_where_none_comes_back(backend: str):
    heads_BTJK = inputs((2, 9, 3, 1, 3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed_attention(x, 1, 4, backend=backend), heads_BTJK)


def test_queries_without_places_are_refused():
    with pytest.raises(ValueError, match="both or neither"):
        packed_attention(inputs(SIZES[1], queries=False), 4, query_MHD=torch.zeros(3, 4, 16, dtype=torch.float64))


@pytest.mark.skipif("native" not in AVAILABLE, reason="no C compiler")
def test_a_type_that_the_kernels_lack_is_left_to_pytorch_and_refused_by_name():
    heads_BTJK = inputs(SIZES[1], torch.float16)
    dispatch.forget()
    packed_attention(heads_BTJK, 4)
    record = dispatch.chosen()["packed_attention"]
    assert record["backend"] == "torch"
    assert "native cannot: it computes in" in record["reason"]
    with pytest.raises(UserError, match="not float16"):
        packed_attention(heads_BTJK, 4, backend="native")


@pytest.mark.skipif("native" not in AVAILABLE, reason="no C compiler")
def test_the_kernels_pass_through_a_compiled_graph():
    size = SIZES[1]
    compiled = torch.compile(lambda x: packed_attention(x, 4, backend="native"), fullgraph=True, backend="aot_eager")
    leaf = inputs(size, torch.float32).requires_grad_()
    o = compiled(leaf)
    (gradient,) = torch.autograd.grad(o.sum(), leaf)
    twin = inputs(size, torch.float32).requires_grad_()
    expected = packed_attention(twin, 4, backend="native")
    assert torch.equal(o, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), twin)[0])
