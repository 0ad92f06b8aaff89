"""The Hopper backend of 2-simplicial attention: on a Hopper GPU against float64; elsewhere what it refuses and why."""

import math

import pytest
import torch
from torch import Tensor

from trivium.ops import dispatch, simplicial_attention
from trivium.ops.simplicial import hopper_support

on_hopper = pytest.mark.skipif(hopper_support.missing() is not None, reason=f"Hopper: {hopper_support.missing()}")

# B, T, Hq, Hkv, D, window1, window2: tokens beside every tile, groups that share their queries' tile and that do not,
# windows beyond T, either window the short one, a short window that is no power of two.
SHAPES = [
    (2, 150, 8, 2, 128, 64, 32),
    (2, 77, 3, 3, 64, 33, 16),
    (1, 300, 64, 1, 128, 128, 32),
    (2, 200, 6, 2, 64, 500, 9),
    (2, 130, 4, 4, 64, 40, 32),
    (2, 90, 4, 2, 32, 16, 64),
    (1, 600, 4, 1, 128, 512, 32),
    (2, 5, 2, 1, 64, 512, 32),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, loud: float = 1.0) -> list[Tensor]:
    batch, tokens, heads, kv_heads, width = shape[:5]
    generator = torch.Generator("cuda").manual_seed(tokens)
    counts = (heads, kv_heads, kv_heads, kv_heads, kv_heads)
    drawn = [torch.randn(batch, tokens, n, width, device="cuda", generator=generator) for n in counts]
    drawn[0] *= loud
    return [x.to(dtype).requires_grad_() for x in drawn]


def run(inputs: list[Tensor], shape: tuple[int, ...], backend: str, **options) -> Tensor:
    return simplicial_attention(*inputs, window1=shape[5], window2=shape[6], backend=backend, **options)


def wide(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def off(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
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
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_loud_logits_take_the_online_softmax_and_stay_finite(shape):
    inputs = draw(shape, torch.bfloat16, loud=30.0)
    found = run(inputs, shape, "hopper")
    assert torch.isfinite(found).all()
    # The keys' products are rounded to bfloat16 and multiplied by logits in the hundreds.
    assert off(found, run(wide(inputs), shape, "torch")) < 5e-2


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
