"""Linear maps, the feed-forward, the norm of a sum and AdamW: every backend gives what the reference gives."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trivium.ops import dispatch
from trivium.ops.adamw import Parameters, adamw
from trivium.ops.add_norm import add_norm
from trivium.ops.feedforward import feedforward
from trivium.ops.linear import LEAST, Linear, linear
from trivium.registry import UserError

TOLERANCES = ((torch.float64, 1e-12), (torch.float32, 2e-5))


def fast(operator: str) -> list[str]:
    return [name for name, missing in dispatch.backends(operator).items() if missing is None and name != "reference"]


needs_compiler = pytest.mark.skipif("native" not in fast("linear"), reason="no C compiler")


def linear_case(rows: int, width: int, wide: int) -> list[tuple[int, ...]]:
    return [(rows, width), (wide, width), (wide,)]


def feedforward_case(rows: int, width: int, wide: int) -> list[tuple[int, ...]]:
    return [(rows, width), (wide, width), (wide,), (width, wide), (width,)]


def norm_case(rows: int, width: int, wide: int) -> list[tuple[int, ...]]:
    return [(rows, width), (rows, width), (width,), (width,)]


def weighted(outputs: tuple[Tensor, ...], seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sums = [(y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum() for y in outputs]
    return torch.stack(sums).sum()


CASES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[..., list[tuple[int, ...]]]]] = {
    "linear": (lambda *given, backend: (linear(*given, backend=backend),), linear_case),
    "feedforward": (lambda *given, backend: (feedforward(*given, backend=backend),), feedforward_case),
    "feedforward, stream": (
        lambda stream, *given, backend: (feedforward(*given, stream=stream, backend=backend),),
        lambda *sizes: [feedforward_case(*sizes)[0], *feedforward_case(*sizes)],
    ),
    "norm of one": (
        lambda *given, backend: add_norm(given[0], None, *given[1:], backend=backend),
        lambda *sizes: norm_case(*sizes)[1:],
    ),
    "add_norm": (lambda *given, backend: add_norm(*given, backend=backend), norm_case),
}

OPERATORS = {"feedforward, stream": "feedforward", "norm of one": "add_norm"}  # of cases that are called otherwise


def run(operator: str, backend: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    leaves = [tensor.requires_grad_() for tensor in given]
    outputs = CASES[operator][0](*leaves, backend=backend)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(weighted(outputs), leaves)]


@pytest.mark.parametrize("sizes", [(0, 3, 4), (1, 1, 1), (7, 5, 3), (97, 17, 33), (800, 24, 40)], ids=str)
@pytest.mark.parametrize(
    ("operator", "backend"), [(name, each) for name in CASES for each in fast(OPERATORS.get(name, name))]
)
def test_a_backend_gives_the_values_and_gradients_of_the_reference(
    operator: str, backend: str, sizes: tuple[int, int, int]
):
    shapes = CASES[operator][1](*sizes)
    expected = run(operator, "reference", shapes, torch.float64)
    for dtype, tolerance in TOLERANCES:
        if "norm" in operator and sizes[1] == 1:
            tolerance *= 1000  # of one number nothing but rounding is left, and divided by the root of epsilon
        for mine, wanted in zip(run(operator, backend, shapes, dtype), expected, strict=True):
            assert mine.dtype == dtype
            assert float((mine.double() - wanted).norm()) <= tolerance * (1 + float(wanted.norm()))


@needs_compiler
@pytest.mark.parametrize("operator", list(CASES))
def test_the_kernels_pass_gradcheck(operator: str):
    generator = torch.Generator().manual_seed(0)
    shapes = CASES[operator][1](5, 4, 3)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *leaves: CASES[operator][0](*leaves, backend="native"), given)


@needs_compiler
@pytest.mark.parametrize("operator", list(CASES))
def test_the_number_of_threads_changes_no_bit(operator: str):
    before = torch.get_num_threads()
    shapes = CASES[operator][1](1000, 24, 40)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(operator, "native", shapes, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(other, results[0], strict=True))


@needs_compiler
def test_gradients_that_nobody_wants_are_not_made():
    shapes = linear_case(70, 6, 5)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for wanted in ([x], [weight], [bias], [x, bias], [weight, bias]):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(any(tensor is each for each in wanted))
        mine, theirs = (
            torch.autograd.grad(weighted((linear(x, weight, bias, backend=name),)), wanted)
            for name in ("native", "torch")
        )
        for grad, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(grad, expected)


@needs_compiler
def test_of_a_sum_either_half_may_go_unused():
    x, y, weight, bias = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in norm_case(70, 6, 0))
    for half in (0, 1):
        leaves = (x, y) if half == 0 else (x, y, weight, bias)
        mine, theirs = (
            torch.autograd.grad(weighted((add_norm(x, y, weight, bias, backend=name)[half],)), leaves)
            for name in ("native", "torch")
        )
        for grad, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(grad, expected)


@needs_compiler
def test_what_autocast_made_narrow_is_added_to_a_wide_stream():
    x, y, weight, bias = (torch.randn(shape).requires_grad_() for shape in norm_case(70, 6, 0))
    results = []
    for backend in ("auto", "torch"):
        dispatch.forget()
        outputs = add_norm(x, y.bfloat16(), weight, bias, backend=backend)
        assert {output.dtype for output in outputs} == {torch.float32}
        assert dispatch.chosen()["add_norm"]["backend"] == ("native" if backend == "auto" else "torch")
        results.append((*outputs, *torch.autograd.grad(weighted(outputs), (x, y, weight, bias))))
    torch.testing.assert_close(*results)


@needs_compiler
def test_a_norm_of_one_tensor_hands_that_on():
    x, _, weight, bias = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in norm_case(70, 6, 0))
    total, normed = add_norm(x, None, weight, bias, backend="native")
    assert torch.equal(total, x)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x, (6,), weight, bias))


def test_a_stream_has_the_shape_of_what_is_added_to_it():
    weights = [torch.ones(shape) for shape in feedforward_case(3, 4, 5)[1:]]
    with pytest.raises(ValueError, match=r"x is \(3, 4\) and the stream \(4,\)"):
        feedforward(torch.ones(3, 4), *weights, stream=torch.ones(4))


def test_the_two_parts_of_a_sum_have_one_shape():
    with pytest.raises(ValueError, match=r"x is \(3, 4\) and y \(4,\)"):
        add_norm(torch.ones(3, 4), torch.ones(4), torch.ones(4), torch.ones(4))


@needs_compiler
@pytest.mark.parametrize("operator", list(CASES))
def test_shapes_that_do_not_fit_are_refused_before_memory_is_read(operator: str):
    function, shapes = CASES[operator][0], CASES[operator][1](70, 6, 5)
    for index, shape in enumerate(shapes):
        wrong = [torch.ones(each) for each in shapes]
        wrong[index] = torch.ones(*shape[:-1], shape[-1] + 1)
        with pytest.raises(ValueError, match=OPERATORS.get(operator, operator)):
            function(*wrong, backend="native")


@needs_compiler
def test_rows_that_do_not_follow_one_another_are_read_in_their_places():
    x, weight = torch.randn(8, 70, 2), torch.randn(5, 8)
    turned = x.permute(2, 1, 0)
    torch.testing.assert_close(
        linear(turned, weight.T.contiguous().T, backend="native"), linear(turned, weight, backend="torch")
    )


@needs_compiler
def test_products_in_bfloat16_are_left_to_pytorch():
    x, weight = torch.randn(LEAST, 4), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        with pytest.raises(UserError, match="bfloat16 products are PyTorch's"):
            linear(x, weight, backend="native")
    assert dispatch._decide("linear", "auto", "cpu", {"dtype": torch.bfloat16})[0] == "torch"


def test_a_device_without_autocast_is_served_too():
    assert linear(torch.ones(LEAST, 4, device="meta"), torch.ones(3, 4, device="meta")).shape == (LEAST, 3)


@needs_compiler
def test_few_rows_are_pytorchs_and_many_are_not():
    layer = Linear(4, 3)
    for rows, product in ((LEAST - 1, True), (LEAST, False)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(rows, 4))
        assert (counter.get_total_flops() > 0) == product


def update(backend: str, dtype: torch.dtype, rounds: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (70, 33), (20000,), (1, 1), (0,)]

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    weights, steps = draw(), [torch.zeros(()) for _ in shapes]
    firsts, seconds = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    norms = []
    for number in range(rounds):
        parameters = Parameters(weights, draw(), firsts, seconds, steps, [0.1, 0.0, 0.1, 0.0, 0.0])
        limit = (1.0, 1e9, math.inf)[number % 3]
        norms.append(adamw(parameters, rate=1e-2, betas=(0.9, 0.98), limit=limit, backend=backend))
    return [*norms, *weights, *firsts, *seconds, *steps]


@pytest.mark.parametrize("backend", fast("adamw"))
def test_an_update_is_that_of_the_reference(backend: str):
    expected = update("reference", torch.float64)
    for dtype, tolerance in TOLERANCES:
        for mine, wanted in zip(update(backend, dtype), expected, strict=True):
            torch.testing.assert_close(mine.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@needs_compiler
def test_the_number_of_threads_changes_no_bit_of_an_update():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(update("native", torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(other, results[0], strict=True))


@needs_compiler
def test_a_gradient_that_is_not_finite_is_seen_in_the_norm():
    weight = torch.ones(4)
    grad = torch.tensor([1.0, torch.nan, 0.0, 0.0])
    parameters = Parameters([weight], [grad], [torch.zeros(4)], [torch.zeros(4)], [torch.zeros(())], [0.0])
    assert adamw(parameters, rate=0.1, betas=(0.9, 0.99), limit=1.0, backend="native").isnan()


@needs_compiler
def test_weights_are_known_to_have_changed():
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * weight).sum()
    moments = [torch.zeros(4)], [torch.zeros(4)], [torch.zeros(())]
    parameters = Parameters([weight], [torch.ones(4)], moments[0], moments[1], moments[2], [0.0])
    adamw(parameters, rate=0.1, betas=(0.9, 0.99))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
