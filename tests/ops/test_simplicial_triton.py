"""The Triton backend against the float64 reference, on a GPU or through Triton's interpreter, and old mistakes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.ops import triton_cases as cases
from trivium.ops import dispatch, simplicial_attention

pytest.importorskip("triton")
on_a_gpu = pytest.mark.skipif(not cases.GPU, reason="needs a GPU: the interpreter is too slow, or cannot")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Give a function that calls another where Triton runs."""
    if cases.GPU:
        yield lambda function, *arguments, **options: cases.call(None, function, *arguments, **options)
        return
    with cases.interpreter() as pool:
        yield lambda function, *arguments, **options: cases.call(pool, function, *arguments, **options)


def within(found: dict[str, float], tolerance: float) -> None:
    assert all(error <= tolerance for error in found.values()), found


SHAPES = [
    pytest.param({}, 5, 3, None, id="tokens that no tile divides, two rows, two key heads"),
    pytest.param({"heads": 6}, 3, 5, None, id="the second window longer, groups of three"),
    pytest.param({"heads": 2, "tokens": 7}, 9, 11, None, id="windows longer than the text"),
    pytest.param({"heads": 2, "tokens": 7}, 1, 4, None, id="a window of one"),
    pytest.param({"heads": 2, "tokens": 1}, 4, 2, None, id="one token"),
    pytest.param({"rows": 1, "heads": 2, "kv_heads": 1, "tokens": 45}, 33, 2, (8, 1, 2, 16), id="edges and full tiles"),
    pytest.param({"rows": 1, "heads": 2, "kv_heads": 1, "tokens": 19}, 18, 8, (1, 2, 8, 16), id="rows of one query"),
    pytest.param({"rows": 1, "heads": 2, "kv_heads": 2}, 6, 7, (4, 1, 4, 16), id="short keys in several chunks"),
    pytest.param({"rows": 1, "heads": 3, "kv_heads": 1}, 6, 2, (4, 2, 2, 16), id="a head that its block lacks"),
]


@pytest.mark.parametrize(("draws", "window1", "window2", "tiles"), SHAPES)
def test_output_and_gradients_equal_the_float64_reference(
    run: Run, draws: dict[str, Any], window1: int, window2: int, tiles: tuple[int, ...] | None
):
    within(run(cases.errors, draws, tiles, window1=window1, window2=window2), 1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("window1", "window2"), [(6, 3), (3, 6)])
def test_determinants_have_right_gradients_whichever_window_is_longer(
    run: Run, window1: int, window2: int, deterministic: bool
):
    draws = {"rows": 1, "heads": 2, "kv_heads": 1, "tokens": 9}
    options = {"form": "determinant", "window1": window1, "window2": window2}
    within(run(cases.errors, draws, (4, 1, 4, 16), deterministic, **options), 1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_no_pair_crosses_a_document(run: Run, form: str, deterministic: bool):
    draws = {"heads": 2, "kv_heads": 1, "documents": True, "tokens": 9}
    within(run(cases.errors, draws, None, deterministic, form=form, window1=6, window2=3), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_as_near_as_its_rounding(run: Run, dtype: torch.dtype):
    within(run(cases.errors, {"dtype": dtype, "width": 16}, window1=5, window2=3), 1e-2)


def test_large_logits_do_not_overflow(run: Run):
    # Rounding of a logit of hundreds moves its weight by 1e-5 and more.
    within(run(cases.errors, {"heads": 2}, window1=5, window2=3, scale=30.0), 1e-4)


@pytest.mark.parametrize("tiles", [None, (2, 2, 4, 16)])
def test_the_deterministic_backward_gives_the_same_bits_twice_and_is_right(run: Run, tiles: tuple[int, ...] | None):
    draws = {"rows": 1, "tokens": 5, "kv_heads": 2 if tiles is None else 1}
    same, errors = run(cases.same_bits_and_errors, draws, tiles, window1=4, window2=6)
    assert same
    within(errors, 1e-5)


def test_a_deterministic_backward_is_on_record(run: Run):
    assert "deterministic" in run(cases.choice_and_reason, True)["reason"]
    assert "deterministic" not in run(cases.choice_and_reason, False)["reason"]


@pytest.mark.parametrize(("documents", "form"), [(False, "trilinear"), (True, "determinant")])
def test_the_operators_are_registered_as_torch_wants(run: Run, documents: bool, form: str):
    run(cases.check_registration, documents, form)


def test_checkpoints_and_autocast_change_nothing(run: Run):
    for found, plain in run(cases.checkpointed_and_in_autocast):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dtype", "float64; allowed: bfloat16, float16, float32"),
        ("form", "factorized form has no Triton kernel"),
        ("width", "head width 384; allowed: at most 256"),
        ("stride", "k1: stride .* of the head width; backend triton needs 1"),
    ],
)
def test_a_call_that_the_kernels_cannot_serve_is_refused_by_name(run: Run, change: str, message: str):
    import re

    assert re.search(message, run(cases.refusal, change))


def test_nothing_in_gives_nothing_out(run: Run):
    assert run(cases.empty_outputs) == [(0, 3, 4, 5), (2, 0, 4, 5)]


# Mistakes of published kernels (SPEC section 7).


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_statistic_is_the_log_sum_exp_in_float32(run: Run, dtype: torch.dtype):
    found, wanted = run(cases.log_sums, dtype)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert (found.bfloat16().float() != found).any()


def test_every_tensor_is_read_with_its_own_strides_in_every_row(run: Run):
    within(run(cases.errors, {"rows": 3, "heads": 2, "tokens": 7, "strided": True}, window1=5, window2=3), 1e-5)


@pytest.mark.parametrize("kv_head", [0, 1, 2])
def test_each_group_of_queries_reads_its_own_key_head(run: Run, kv_head: int):
    assert run(cases.heads_moved_by, kv_head) == [2 * kv_head, 2 * kv_head + 1]


@pytest.mark.parametrize("name", ["q", "k1", "k2", "v1", "v2"])
def test_each_gradient_is_the_slope_along_its_own_input(run: Run, name: str):
    # A backward pass that takes its arguments in another order than it is given them has the right shapes.
    by_gradient, by_difference = run(cases.slopes, name)
    assert abs(by_gradient - by_difference) < 1e-3 * max(1.0, abs(by_difference))


@pytest.mark.parametrize(("changed", "window"), [("k1", 4), ("v1", 4), ("k2", 2), ("v2", 2)])
def test_a_window_ends_where_it_says(run: Run, changed: str, window: int):
    wanted = [list(range(max(0, i - window + 1), i + 1)) for i in range(7)]
    if changed.startswith("k"):  # A softmax over one key alone does not see it: token 0 reads one pair.
        wanted[0] = []
    assert run(cases.reads, changed, 4, 2) == wanted


@pytest.mark.parametrize("width", [24, 128])
def test_no_head_width_is_pinned(run: Run, width: int):
    draws = {"rows": 1, "tokens": 3, "heads": 2, "kv_heads": 1, "width": width}
    within(run(cases.errors, draws, window1=2, window2=2), 1e-5)


@pytest.mark.parametrize(("window1", "window2"), [(5, 3), (3, 5)])
def test_a_bias_is_added_and_has_gradients(run: Run, window1: int, window2: int):
    within(run(cases.errors, {"bias": True, "heads": 2, "tokens": 7}, window1=window1, window2=window2), 1e-5)


# What only a GPU can show.

TARGETS = [
    pytest.param({"rows": 1, "tokens": 700, "heads": 64, "kv_heads": 1, "width": 128}, 512, 32, id="grouped"),
    pytest.param({"rows": 2, "tokens": 700, "heads": 8, "kv_heads": 8, "width": 64}, 512, 32, id="H8 D64 512x32"),
    pytest.param({"rows": 2, "tokens": 300, "heads": 12, "kv_heads": 12, "width": 64}, 128, 16, id="H12 D64 128x16"),
    pytest.param({"rows": 4, "tokens": 128, "heads": 8, "kv_heads": 8, "width": 32}, 128, 16, id="H8 D32 128x16"),
    pytest.param({"rows": 2, "tokens": 131, "heads": 4, "kv_heads": 2, "width": 256}, 64, 8, id="D256"),
    pytest.param({"rows": 2, "tokens": 131, "heads": 6, "kv_heads": 2, "width": 80}, 64, 200, id="groups of 3, D80"),
    pytest.param({"rows": 2, "tokens": 131, "heads": 2, "kv_heads": 1, "width": 16}, 1, 64, id="D16, one short key"),
    pytest.param({"rows": 2, "tokens": 260, "heads": 4, "kv_heads": 4, "width": 64}, 100, 2, id="two short keys"),
]


@on_a_gpu
@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"form": "determinant"}], ids=str)
@pytest.mark.parametrize("extra", [{}, {"documents": True}], ids=str)
@pytest.mark.parametrize(("draws", "window1", "window2"), TARGETS)
def test_real_sizes_are_right_on_a_gpu(
    run: Run, draws: dict[str, Any], window1: int, window2: int, extra: dict[str, Any], options: dict[str, Any]
):
    draws = draws | extra | {"dtype": torch.bfloat16}
    within(run(cases.errors, draws, window1=window1, window2=window2, against="torch", **options), 1e-2)


@on_a_gpu
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_block_equals_the_plain_one(dtype: torch.dtype):
    tensors = [x for x in cases.draw(tokens=64, width=32, dtype=dtype).values() if isinstance(x, torch.Tensor)]

    def block(*inputs: torch.Tensor) -> torch.Tensor:
        o = simplicial_attention(*(x * 2 for x in inputs), window1=16, window2=4, backend="triton")  # pyright: ignore
        return o.relu().square().sum()

    plain = torch.autograd.grad(block(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(block, fullgraph=True)(*tensors), tensors)
    for x, y in zip(compiled, plain, strict=True):
        assert (x - y).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * y.norm()


@pytest.mark.skipif(cases.GPU, reason="here Triton has a GPU")
def test_without_a_gpu_the_backend_says_what_is_missing():
    assert dispatch.backends("simplicial")["triton"] == "torch sees no GPU, and TRITON_INTERPRET=1 is not set"
