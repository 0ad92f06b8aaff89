"""The Hopper backend of 2-simplicial attention: on a Hopper GPU against float64; elsewhere what it refuses and why."""

import math

import pytest
import torch
from torch import Tensor

from trivium.ops import dispatch, simplicial_attention
from trivium.ops.simplicial import hopper_support

on_hopper = pytest.mark.skipif(hopper_support.missing() is not None, reason=f"Hopper: {hopper_support.missing()}")

# B, T, Hq, Hkv, D, window1, window2: tokens beside every tile, groups that share their queries' tile and that do not,
# windows beyond T and beyond 32 bits, either window the short one, a short window that is no power of two.
SHAPES = [
    (2, 150, 8, 2, 128, 64, 32),
    (2, 77, 3, 3, 64, 33, 16),
    (1, 300, 64, 1, 128, 128, 32),
    (2, 200, 6, 2, 64, 500, 9),
    (2, 130, 4, 4, 64, 40, 32),
    (2, 90, 4, 2, 32, 16, 64),
    (1, 600, 4, 1, 128, 512, 32),
    (2, 5, 2, 1, 64, 2**40, 32),
]

# Keys of a head that stay in shared memory: tokens beside every tile and fewer than a tile, one query of many heads a
# tile, three blocks of heads, windows that leave out tiles, short windows of less than half a warp's rows, programs of
# many units over three heads and more, whose buffers are filled again.
RESIDENT_SHAPES = [
    (2, 100, 4, 4, 32, 128, 16),
    (40, 128, 8, 8, 32, 128, 16),
    (3, 128, 8, 1, 32, 60, 12),
    (2, 37, 16, 1, 32, 20, 8),
    (2, 18, 16, 2, 32, 64, 16),
    (1, 3, 6, 2, 32, 64, 9),
    (40, 100, 12, 4, 32, 128, 16),
    (300, 5, 24, 2, 32, 64, 12),
]
ONE_TOKEN = (2, 1, 4, 4, 32, 128, 16)  # of a head whose keys would stay in shared memory: another kernel takes it

# For the backward kernel: groups of one head to two blocks of 64, strips of long keys left over
# (1, 2 and 3 of 4) and none, windows beyond T, a short window that is no power of two.
BACKWARD_SHAPES = [
    (1, 300, 64, 1, 128, 128, 32),
    (2, 150, 8, 2, 128, 64, 32),
    (2, 77, 3, 3, 128, 33, 16),
    (2, 200, 6, 2, 128, 500, 9),
    (2, 260, 32, 1, 128, 200, 20),
    (1, 130, 128, 1, 128, 97, 32),
    (2, 90, 4, 2, 128, 64, 64),
    (2, 5, 2, 1, 128, 512, 32),
    (2, 260, 32, 2, 64, 128, 20),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, loud: float = 1.0) -> list[Tensor]:
    batch, tokens, heads, kv_heads, width = shape[:5]
    generator = torch.Generator("cuda").manual_seed(tokens)
    counts = (heads, kv_heads, kv_heads, kv_heads, kv_heads)
    drawn = [torch.randn(batch, tokens, n, width, device="cuda", generator=generator) for n in counts]
    drawn[0] *= loud
    return [x.to(dtype).requires_grad_() for x in drawn]


def size_of(size: tuple) -> tuple[int, ...]:
    return tuple(size[0]) if size and not isinstance(size[0], int) else size


def run(inputs: list[Tensor], shape: tuple[int, ...], backend: str, **options) -> Tensor:
    return simplicial_attention(*inputs, window1=shape[5], window2=shape[6], backend=backend, **options)


def wide(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def off(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, *RESIDENT_SHAPES])
def test_output_and_gradients_agree_with_float64(shape, dtype):
    inputs = draw(shape, dtype)
    truth = wide(inputs)
    wanted, found = run(truth, shape, "torch"), run(inputs, shape, "hopper")
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert off(found, wanted) < tolerance
    gradient = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, truth, gradient)
    for mine, theirs in zip(torch.autograd.grad(found, inputs, gradient.to(dtype)), expected, strict=True):
        assert off(mine, theirs) < 2 * tolerance


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_has_one_pair_so_that_its_queries_and_keys_have_no_gradient(dtype):
    inputs = draw(ONE_TOKEN, dtype)
    truth = wide(inputs)
    wanted, found = run(truth, ONE_TOKEN, "torch"), run(inputs, ONE_TOKEN, "hopper")
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert off(found, wanted) < tolerance
    gradient = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, truth, gradient)
    for mine, theirs in zip(torch.autograd.grad(found, inputs, gradient.to(dtype)), expected, strict=True):
        none = theirs.norm() < 1e-12 * gradient.norm()  # what is left of a difference of equals
        assert mine.double().norm() < tolerance * gradient.norm() if none else off(mine, theirs) < 2 * tolerance


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", BACKWARD_SHAPES)
def test_the_backward_kernel_agrees_with_float64_and_reads_no_memory_that_it_did_not_write(shape, dtype, monkeypatch):
    from trivium.ops.simplicial.hopper_gradients import hopper_backward
    from trivium.ops.simplicial.hopper_launch import hopper_forward

    inputs = draw(shape, dtype)
    truth = wide(inputs)
    wanted = run(truth, shape, "torch")
    gradient = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, truth, gradient)
    q, k1, k2, v1, v2 = (x.detach() for x in inputs)
    scale = shape[4] ** -0.5
    o, lse = hopper_forward(q, k1, k2, v1, v2, shape[5], shape[6], scale)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(size_of(size), math.nan, **options))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, math.nan))
    dq, dk1, dv1, dk2, dv2 = hopper_backward(gradient.to(dtype), q, k1, v1, k2, v2, o, lse, *shape[5:], scale)
    for mine, theirs in zip((dq, dk1, dk2, dv1, dv2), expected, strict=True):
        assert off(mine, theirs) < 1e-2


@on_hopper
def test_a_large_group_goes_backward_by_hopper_and_a_deterministic_run_by_triton_with_the_same_bits():
    shape = BACKWARD_SHAPES[0]
    inputs = draw(shape, torch.bfloat16)
    bias = tuple(torch.randn(1, 128, device="cuda", requires_grad=True) for _ in range(2))
    every = [*inputs, *bias]
    gradient = torch.randn_like(inputs[0])

    def gradients():
        return torch.autograd.grad(run(inputs, shape, "hopper", bias=bias), every, gradient)

    found = gradients()
    assert "backward by Hopper" in dispatch.chosen()["simplicial"]["reason"]
    torch.use_deterministic_algorithms(True)
    try:
        once, twice = gradients(), gradients()
        assert "backward by Triton: deterministic" in dispatch.chosen()["simplicial"]["reason"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    truth = wide(every)
    wanted = run(truth[:5], shape, "torch", bias=(truth[5], truth[6]))
    expected = torch.autograd.grad(wanted, truth, gradient.double())
    for mine, triton, theirs in zip(found, once, expected, strict=True):
        assert off(mine, theirs) < 1e-2
        assert off(triton, theirs) < 1e-2


@on_hopper
def test_loud_logits_leave_the_gradients_finite():
    shape = BACKWARD_SHAPES[0]
    inputs = draw(shape, torch.bfloat16, loud=30.0)
    found = run(inputs, shape, "hopper")
    for gradient in torch.autograd.grad(found, inputs, torch.randn_like(found)):
        assert torch.isfinite(gradient).all()


@on_hopper
@pytest.mark.parametrize("shape", [*SHAPES[:3], *RESIDENT_SHAPES, ONE_TOKEN])
def test_loud_logits_take_the_online_softmax_and_stay_finite(shape):
    inputs = draw(shape, torch.bfloat16, loud=30.0)
    found = run(inputs, shape, "hopper")
    assert torch.isfinite(found).all()
    # The keys' products are rounded to bfloat16 and multiplied by logits in the hundreds.
    assert off(found, run(wide(inputs), shape, "torch")) < 5e-2


def low(inputs: list[Tensor]) -> list[Tensor]:
    """Return inputs whose logits are all far below what exp2 can tell from zero."""
    q, k1, k2, v1, v2 = (x.detach() for x in inputs)
    return [-(1 + q.abs()) * 200 / q.shape[3] ** 0.5, torch.ones_like(k1), torch.ones_like(k2), v1, v2]


@on_hopper
@pytest.mark.parametrize("shape", [*SHAPES[:3], SHAPES[5], *RESIDENT_SHAPES, ONE_TOKEN])
def test_logits_far_below_zero_do_not_vanish(shape):
    from trivium.ops.simplicial.hopper_launch import hopper_forward

    inputs = low(draw(shape, torch.bfloat16))
    o, lse = hopper_forward(*(inputs[i] for i in (0, 1, 2, 3, 4)), shape[5], shape[6], shape[4] ** -0.5)
    assert float(lse.max()) < -100
    assert off(o, run(wide(inputs), shape, "torch")) < 5e-2


@on_hopper
@pytest.mark.parametrize("shape", [*SHAPES[:3], SHAPES[5], *RESIDENT_SHAPES])
def test_queries_past_the_range_leave_all_others_right(shape):
    inputs = [x.detach() for x in draw(shape, torch.bfloat16)]
    loud = shape[1] // 3
    inputs[0][-1, loud:, -1] *= 30
    found, wanted = run(inputs, shape, "hopper"), run(wide(inputs), shape, "torch")
    assert off(found[:, :loud], wanted[:, :loud]) < 1e-2
    assert off(found, wanted) < 5e-2


@on_hopper
def test_the_log_sum_exp_is_that_of_all_pairs_in_float32():
    from trivium.ops.simplicial.hopper_launch import hopper_forward

    shape = (2, 40, 4, 2, 64, 64, 16)
    q, k1, k2, v1, v2 = (x.detach() for x in draw(shape, torch.bfloat16))
    _, lse = hopper_forward(q, k1, k2, v1, v2, 64, 16, 0.125)
    assert lse.dtype == torch.float32
    keys = [x.double().repeat_interleave(2, dim=2) for x in (k1, k2)]
    logits = 0.125 * torch.einsum("bihd,bjhd,bkhd->bhijk", q.double(), *keys)
    i = torch.arange(40, device="cuda")
    age = i[:, None] - i
    allowed = (age >= 0)[:, :, None] & ((age >= 0) & (age < 16))[:, None, :]
    wanted = logits.masked_fill(~allowed, -math.inf).flatten(3).logsumexp(3)
    assert float((lse - wanted).abs().max()) < 1e-2


@on_hopper
def test_bias_enters_keys_and_values_of_the_second_pair():
    shape = SHAPES[1]
    inputs = draw(shape, torch.bfloat16)
    bias = (torch.randn(3, 64, device="cuda"), torch.randn(3, 64, device="cuda"))
    wanted = run(wide(inputs), shape, "torch", bias=tuple(x.double() for x in bias))
    assert off(run(inputs, shape, "hopper", bias=bias), wanted) < 1e-2


@on_hopper
def test_the_same_inputs_give_the_same_bits():
    inputs = draw(SHAPES[0], torch.bfloat16)
    assert torch.equal(run(inputs, SHAPES[0], "hopper"), run(inputs, SHAPES[0], "hopper"))


@on_hopper
def test_compiled_as_one_graph_the_result_is_equal():
    inputs = draw(SHAPES[0], torch.bfloat16)
    # Inductor's import warns, which is an error here; the graph and its operators are what this is about.
    compiled = torch.compile(lambda *x: run(list(x), SHAPES[0], "hopper"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), run(inputs, SHAPES[0], "hopper"))


@on_hopper
def test_auto_picks_it_where_it_serves_and_triton_elsewhere():
    facts = (("form", "trilinear"), ("dtype", torch.bfloat16), ("width", 64), ("window1", 512), ("window2", 32))
    assert dispatch.choose("simplicial", "auto", "cuda", facts) == "hopper"
    assert dispatch.choose("simplicial", "auto", "cuda", (*facts, ("documents", True))) == "triton"
    assert "hopper cannot: documents" in dispatch.chosen()["simplicial"]["reason"]


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"form": "determinant"}, "trilinear"),
        ({"documents": True}, "documents"),
        ({"dtype": torch.float32}, "bfloat16"),
        ({"width": 80}, "64"),
        ({"window1": 512, "window2": 65}, "8 to 64"),
        ({"window1": 4, "window2": 512}, "8 to 64"),
    ],
)
def test_what_it_cannot_serve_is_said_with_what_it_can(facts, why):
    said = hopper_support.refuses(facts)
    assert said is not None
    assert why in said


def test_the_shapes_of_the_paper_are_served():
    assert hopper_support.refuses({"width": 128, "dtype": torch.bfloat16, "window1": 512, "window2": 32}) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_hopper_gpu_it_is_missing_with_a_reason():
    assert hopper_support.missing()


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"deterministic": True}, "deterministic"),
        ({"width": 32}, "128"),
        ({"group": 1, "window1": 512, "window2": 32}, "32 rows"),
    ],
)
def test_a_backward_that_triton_does_is_on_record_with_the_reason(facts, why):
    assert why in str(hopper_support.refuses_backward(facts))
    assert hopper_support.remark(facts).startswith("backward by Triton")


def test_the_grouped_shapes_go_backward_by_hopper():
    facts = {"width": 128, "group": 64, "window1": 512, "window2": 32, "deterministic": False}
    assert hopper_support.refuses_backward(facts) is None
    assert hopper_support.remark(facts) == "backward by Hopper kernels"


@pytest.mark.parametrize(("most", "divisors"), [(1, (1, 1)), (512, (16, 8)), (4, (8192, 1)), (24576, (8191, 12))])
def test_a_place_by_reciprocals_is_that_of_the_divisions(most: int, divisors: tuple[int, int]):
    pytest.importorskip("triton.experimental.gluon")
    from trivium.ops.simplicial.hopper_describe import reciprocals

    shift, *by = reciprocals(most, *divisors)
    for divisor, factor in zip(divisors, by, strict=True):
        last = most * divisor - 1
        for n in {0, 1, divisor - 1, divisor, last // 2, last - 1, last, *range(0, last, last // 97 + 1)}:
            assert n * factor < 2**63
            assert n * factor >> shift == n // divisor


def test_more_rows_than_reciprocals_can_tell_apart_are_refused():
    pytest.importorskip("triton.experimental.gluon")
    from trivium.ops.simplicial.hopper_describe import reciprocals

    with pytest.raises(ValueError, match=f"tiles: {2**24} rows of up to {2**24 - 1} are more than the kernel counts"):
        reciprocals(2**24, 2**24 - 1)
