"""`simplicial_decode` over ring buffers against the operator over whole sequences, with unequal rows."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.ops import decode_cases, triton_cases
from trivium.ops import dispatch, simplicial_decode
from trivium.ops.native.support import missing as native_missing
from trivium.ops.simplicial import decode_support, hopper_support

on_hopper = pytest.mark.skipif(hopper_support.missing() is not None, reason=f"Hopper: {hopper_support.missing()}")
on_a_gpu = pytest.mark.skipif(not triton_cases.GPU, reason="needs a GPU")
Run = Callable[..., Any]
LENGTHS = [1, 9, 4, 0, 23]  # before the rings are full, after, and a row that has seen nothing


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Give a function that calls another where Triton runs."""
    pytest.importorskip("triton")
    if triton_cases.GPU:
        yield lambda function, *arguments, **options: function(*arguments, **options)
        return
    with triton_cases.interpreter() as pool:
        yield lambda function, *arguments, **options: triton_cases.call(pool, function, *arguments, **options)


CASES = [
    pytest.param({}, id="one token"),
    pytest.param({"heads": 6, "slots": (3, 5)}, id="the second window longer, groups of three"),
    pytest.param({"slots": (1, 4), "kv_heads": 4}, id="a window of one"),
    pytest.param({"slots": (40, 3), "windows": (99, 3), "kv_heads": 1}, id="a ring smaller than its window"),
    pytest.param({"slots": (9, 7), "windows": (5, 4), "tokens": 4}, id="four tokens"),
    pytest.param({"slots": (8, 4), "windows": (5, 4)}, id="a ring longer than its window"),
    pytest.param({"form": "determinant", "slots": (2, 6)}, id="determinants, the second window longer"),
    pytest.param({"form": "determinant", "slots": (8, 6), "windows": (6, 4), "tokens": 3}, id="three determinants"),
]


@pytest.mark.parametrize("draws", CASES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_plain_backends_give_the_last_tokens_of_whole_sequences(backend: str, draws: dict[str, Any]):
    # Zero times NaN is NaN in a matrix product: what plain PyTorch must not read it may multiply by zero.
    garbage = torch.nan if backend == "reference" else 1e30
    assert decode_cases.error(backend, LENGTHS, **draws, garbage=garbage) < 1e-5


@pytest.mark.skipif(native_missing() is not None, reason=f"kernels in C: {native_missing()}")
@pytest.mark.parametrize(
    "draws",
    [
        {},
        {"heads": 6, "slots": (3, 5)},
        {"slots": (1, 4), "kv_heads": 4},
        {"slots": (40, 3), "windows": (99, 3), "kv_heads": 1},
        {"slots": (8, 4), "windows": (5, 4)},
        {"slots": (70, 33), "width": 37, "lengths": [75, 200, 12]},
        {"slots": (20, 18), "width": 64, "loud": 30.0},
    ],
)
def test_the_kernel_in_c_gives_the_last_token_of_whole_sequences(
    draws: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode_cases, "DEVICE", "cpu")
    draws = {"lengths": LENGTHS, **draws}
    assert decode_cases.error("native", **draws) < 1e-5 * (10 if "loud" in draws else 1)


@pytest.mark.skipif(native_missing() is not None, reason=f"kernels in C: {native_missing()}")
def test_logits_far_below_zero_weigh_as_others_do():
    """Keys that fill a vector up have the logit 0, and must not pass for the largest."""
    q, k1, k2 = torch.ones(1, 1, 1, 4), torch.full((1, 3, 1, 4), -100.0), torch.ones(1, 2, 1, 4)
    v1, v2 = torch.arange(12.0).view(1, 3, 1, 4), torch.ones(1, 2, 1, 4)
    o = simplicial_decode(q, k1, k2, v1, v2, torch.tensor([3]), window1=3, window2=2, backend="native")
    torch.testing.assert_close(o.flatten(), torch.tensor([4.0, 5.0, 6.0, 7.0]))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("windows", [(5, 3), (3, 5)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_factorized_form_reads_one_ring_of_values(backend: str, windows: tuple[int, int], tokens: int):
    slots = (windows[0] + tokens - 1, windows[1] + tokens - 1)
    draws = {"form": "factorized", "slots": slots, "windows": windows, "tokens": tokens, "garbage": 1e30}
    assert decode_cases.error(backend, LENGTHS, **draws) < 1e-5


@pytest.mark.parametrize("draws", CASES)
def test_triton_gives_the_last_tokens_of_whole_sequences(run: Run, draws: dict[str, Any]):
    assert run(decode_cases.error, "triton", LENGTHS, **draws) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_as_near_as_its_rounding(run: Run, dtype: torch.dtype):
    assert run(decode_cases.error, "triton", LENGTHS, width=16, dtype=dtype) < 1e-2


def test_large_logits_do_not_overflow(run: Run):
    assert run(decode_cases.error, "triton", LENGTHS, loud=30.0) < 1e-4


def test_short_rings_of_several_chunks_are_joined(run: Run):
    draws = {"slots": (80, 70), "heads": 2, "kv_heads": 1, "lengths": [75, 200]}
    assert run(decode_cases.error, "triton", **draws) < 1e-5


def test_the_operator_is_registered_as_torch_wants(run: Run):
    run(decode_cases.check_registration)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": True}, "cannot: gradients through a continued state"),
        ({"double": True}, "float64; allowed: bfloat16, float16, float32"),
        ({"strided": True}, "k1: stride .* of the head width; backend triton needs 1"),
    ],
)
def test_a_call_that_the_kernel_cannot_serve_is_refused_by_name(run: Run, change: dict[str, Any], message: str):
    assert re.search(message, run(decode_cases.refusal, "triton", **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window1": 0}, "window1: 0 is not allowed"),
        ({"form": "trilinera"}, "did you mean 'trilinear'"),
        ({"form": "factorized"}, "v2: a tensor does not go with form='factorized'"),
    ],
)
def test_arguments_that_disagree_are_named(change: dict[str, Any], message: str):
    assert message in decode_cases.refusal("torch", **change)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 1, 3, 4), "q: 3 heads are not a multiple of the 2 key/value heads"),
        ("v1", (2, 4, 2, 4), r"v1: shape \(2, 4, 2, 4\); .* it must be \(2, 5, 2, 4\)"),
        ("lengths", (3,), r"lengths: .* of shape \(3,\)"),
        ("k2", (2, 0, 2, 4), r"k2: shape \(2, 0, 2, 4\); a ring has at least one slot"),
    ],
)
def test_shapes_that_disagree_are_named(name: str, shape: tuple[int, ...], message: str):
    rings = dict(zip(("q", "k1", "k2", "v1", "v2"), decode_cases.draw([3, 9], width=4, garbage=0.0)[0], strict=True))
    arguments: dict[str, Any] = rings | {"lengths": torch.tensor([3, 9])}
    arguments[name] = torch.ones(shape, dtype=torch.int64 if name == "lengths" else torch.float32)
    with pytest.raises(ValueError, match=message):
        simplicial_decode(**{k: v.to(triton_cases.DEVICE) for k, v in arguments.items()}, window1=5, window2=3)


@pytest.mark.parametrize("lengths", [None, [3, 9], torch.tensor([True, False]), torch.tensor([3.0, 9.0])], ids=str)
def test_lengths_are_whole_numbers_in_a_tensor(lengths: Any):
    tensors = [torch.ones(2, 1, 2, 4)] + [torch.ones(2, 5, 2, 4)] * 4
    with pytest.raises(ValueError, match=r"^lengths: "):
        simplicial_decode(*tensors, lengths, window1=5, window2=5)


def test_no_rows_or_no_tokens_give_nothing():
    q, k1, k2, v1, v2 = decode_cases.draw([3, 9], garbage=0.0)[0]
    lengths = torch.tensor([3, 9], device=triton_cases.DEVICE)
    assert q is not None
    assert simplicial_decode(q[:, :0], k1, k2, v1, v2, lengths, window1=5, window2=3).shape == (2, 0, 4, 5)  # pyright: ignore
    none = [x[:0] for x in (q, k1, k2, v1, v2) if x is not None]
    assert simplicial_decode(*none, lengths[:0], window1=5, window2=3).shape == (0, 1, 4, 5)


# The Hopper kernel.

PAPER = {"heads": 64, "kv_heads": 1, "width": 128, "slots": (512, 32), "dtype": torch.bfloat16}
HOPPER_CASES = [
    pytest.param(PAPER, [600, 513, 512, 511, 300, 129, 128, 33, 32, 31, 1, 0], id="the paper's windows, any fill"),
    pytest.param(PAPER | {"heads": 16, "kv_heads": 2, "width": 64, "slots": (300, 9)}, [1000, 300, 7, 0], id="D64, 9"),
    pytest.param(PAPER | {"heads": 8, "kv_heads": 4, "slots": (64, 130)}, [1000, 129, 7], id="the second longer"),
    pytest.param(PAPER | {"heads": 4, "dtype": torch.float16}, [1000, 77], id="float16"),
    pytest.param(PAPER | {"heads": 4, "loud": 30.0}, [1000, 77], id="loud logits"),
    pytest.param(PAPER | {"slots": (100, 32), "windows": (512, 32)}, [100, 1], id="a ring smaller than its window"),
    pytest.param(PAPER | {"heads": 128, "kv_heads": 1}, [700 + i for i in range(70)], id="many rows"),
]


@on_hopper
@pytest.mark.parametrize(("draws", "lengths"), HOPPER_CASES)
@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_kernels_are_right_at_real_sizes(backend: str, draws: dict[str, Any], lengths: list[int]):
    # Loud queries: products of keys are rounded to 16 bits and multiplied by logits in the hundreds.
    assert decode_cases.error(backend, lengths, **draws) < (5e-2 if "loud" in draws else 1e-2)


@on_hopper
@pytest.mark.parametrize("factor", [30.0, -200.0])
def test_rows_past_the_range_leave_all_others_right(factor: float):
    lengths = [600, 40, 1, 513, 77]
    rings, _ = decode_cases.draw(lengths, **PAPER, garbage=0.0)
    q, k1, k2, v1, v2 = (x for x in rings if x is not None)
    q[1, :, -1] *= factor  # negative: with keys of ones all its logits are far below zero
    if factor < 0:
        q[1].abs_().neg_().sub_(factor / -10)
        k1[1], k2[1] = 1.0, 1.0
    counts = torch.tensor(lengths, device="cuda")
    options: dict[str, Any] = {"window1": 512, "window2": 32}
    found = simplicial_decode(q, k1, k2, v1, v2, counts, **options, backend="hopper").double()
    wanted = simplicial_decode(*(x.double() for x in (q, k1, k2, v1, v2)), counts, **options, backend="torch")
    for b in range(5):
        assert float((found[b] - wanted[b]).norm() / wanted[b].norm()) < (5e-2 if b == 1 else 1e-2)


@on_a_gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_captured_step_replays_with_other_lengths_and_rings(backend: str):
    def case(shift: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        lengths = [40 + shift, 3 + shift, 600]
        rings, _ = decode_cases.draw(lengths, **PAPER, garbage=0.0)
        return [x for x in rings if x is not None], torch.tensor(lengths, device="cuda")

    (rings, lengths), (others, later) = case(0), case(25)
    others[0] = others[0] * 0.5
    options = {"window1": 512, "window2": 32, "backend": backend}
    wanted = simplicial_decode(*others, later, **options)
    simplicial_decode(*rings, lengths, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = simplicial_decode(*rings, lengths, **options)
    for old, new in zip([*rings, lengths], [*others, later], strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"form": "determinant"}, "trilinear"),
        ({"gradients": True}, "gradients"),
        ({"dtype": torch.float32}, "bfloat16"),
        ({"width": 32}, "64, 128"),
        ({"tokens": 2}, "allowed: 1"),
        ({"older": True}, "longer than their windows"),
        ({"slots1": 4, "slots2": 512}, "8 to 64"),
        ({"group": 2, "slots2": 32}, "multiples of 4"),
    ],
)
def test_what_the_hopper_kernel_cannot_serve_is_said_with_what_it_can(facts: dict[str, Any], why: str):
    said = decode_support.hopper_refuses(facts)
    assert said is not None
    assert why in said


def test_the_paper_s_decode_is_served():
    facts = {"width": 128, "dtype": torch.bfloat16, "slots1": 512, "slots2": 32, "group": 64, "tokens": 1}
    assert decode_support.hopper_refuses(facts) is None


@pytest.mark.skipif(triton_cases.GPU, reason="says what a machine without a GPU is told")
def test_a_step_with_gradients_takes_plain_pytorch_and_says_why():
    assert dispatch.choose("simplicial_decode", "auto", "cpu", (("gradients", True),)) == "torch"
