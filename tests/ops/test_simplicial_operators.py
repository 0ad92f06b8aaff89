"""Operators of functions that launch kernels, shown on one that multiplies on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from trivium.ops.simplicial import hopper_support, operators
from trivium.ops.simplicial.launches import aligned, launch
from trivium.ops.simplicial.operators import Operator, check_rows


def _run(x: Tensor, y: Tensor, times: int) -> Tensor:
    return x * y * times


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.times = inputs[2]


def _gradients(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    return dz * y * ctx.times, dz * x * ctx.times, None


product = Operator("test_product", _run, lambda x, *rest: torch.empty_like(x), _gradients, _remember)


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, generator=generator, requires_grad=True) for _ in range(2))
    return x, y


def test_it_is_registered_as_torch_wants():
    torch.library.opcheck(product.op, (*draw(), 3))


def test_a_plain_call_equals_the_registered_one_in_value_and_gradient():
    inputs = draw()
    straight, registered = product(*inputs, 3), product.op(*inputs, 3)
    assert torch.equal(straight, registered)
    for x, y in zip(*(torch.autograd.grad(z.sum(), inputs) for z in (straight, registered)), strict=True):
        assert torch.equal(x, y)
    assert not product(*(x.detach() for x in inputs), 3).requires_grad


def test_gradients_of_gradients_are_refused_not_wrong():
    x, y = draw()
    (dx,) = torch.autograd.grad(product(x, y, 3).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# torch 2.11's compiler runs into its own deprecation.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_graph_holds_the_operator():
    found = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, y = draw()
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: product(a, b, 3) + 1, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x, y), product(x, y, 3) + 1)
    assert any("test_product" in target for target in found)


def test_a_tensor_without_data_gets_the_shape_alone():
    with FakeTensorMode() as mode:
        fake = torch.empty(3, 4)
        assert product(fake, fake, 3).shape == (3, 4)
    outside = mode.from_tensor(torch.ones(3, 4))
    assert product(outside, outside, 3).shape == (3, 4)


def test_a_head_width_that_is_not_contiguous_is_refused_by_name():
    good, turned = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3).transpose(2, 3)
    with pytest.raises(ValueError, match=r"k1: stride 3 of the head width; backend hopper needs 1: give k1\.contig"):
        check_rows("hopper", q=good, k1=turned)


def _attend(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q * 2, q.sum(3).transpose(1, 2).contiguous()


@pytest.mark.parametrize(("name", "short"), [("hopper", 8), ("hopper", 64), ("triton", 8)])
def test_backward_passes_read_what_was_saved_once_as_checkpoints_ask(
    name: str, short: int, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("triton.experimental.gluon")
    from trivium.ops.simplicial import hopper_launch, triton_launch

    # Rows times the short window of 8 are too few for the Hopper backward, so that it gives way to Triton's.
    called: list[str] = []

    def backward(named: str) -> Any:
        def found(do: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            called.append(named)
            return tuple(do.sum() * x for x in inputs[:5])

        return found

    monkeypatch.setattr(triton_launch, "_backward", backward("triton"))
    monkeypatch.setattr(hopper_launch, "_backward", backward("hopper"))
    gradients = hopper_launch._gradients if name == "hopper" else triton_launch.gradients
    members = {"forward": _attend, "setup_context": operators.remember, "backward": gradients}
    function: Any = type("function", (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()})
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 3, n, 64, generator=generator, requires_grad=True) for n in (8, 1, 1, 1, 1)]

    def attend(*inputs: Tensor) -> Tensor:
        return function.apply(*inputs, None, 64, short, 0.125, 0)[0]

    results = (attend(*tensors), checkpoint(attend, *tensors, use_reentrant=False))
    plain, again = (torch.autograd.grad(o.sum(), tensors) for o in results)
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
    assert called == ["hopper" if (name, short) == ("hopper", 64) else "triton"] * 2


def test_sizes_of_dynamic_shapes_choose_the_hopper_backward():
    answers = []

    def choose(q: Tensor) -> Tensor:
        facts = {"width": q.shape[3], "group": q.shape[2], "window1": 64, "window2": 32}
        answers.append(hopper_support.refuses_backward(facts))
        return q + 1

    for width, heads in ((64, 16), (128, 4), (32, 64)):
        make_fx(choose, tracing_mode="symbolic")(torch.zeros(2, 5, heads, width))
    assert answers[0] is None
    assert "rows (query heads" in str(answers[1])
    assert str(answers[2]).startswith("head width")


class _Kernel:
    """A kernel that notes how it was launched, first by Triton, then at hand."""

    arg_names = ("x", "y", "SIZE")

    def __init__(self):
        self.calls: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, **options: Any) -> Any:
            self.calls.append(("looked at", grid, arguments))
            return _AtHand(self.calls)

        return start


class _AtHand:
    def __init__(self, calls: list[tuple[str, tuple[int, ...], tuple[Any, ...]]]):
        self._calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self._calls.append(("at hand", grid, arguments))


def test_the_second_launch_under_a_key_skips_the_look_at_arguments_and_another_key_does_not():
    kernel = _Kernel()
    for key in (("a",), ("a",), ("b",), None, None):
        launch(kernel, key, (7,), 1, 2, constants={"SIZE": 16}, num_warps=4)
    assert [how for how, _, _ in kernel.calls] == ["looked at", "at hand", "looked at", "looked at", "looked at"]
    assert kernel.calls[1] == ("at hand", (7, 1, 1), (1, 2, 16))


def test_addresses_that_are_no_multiple_of_16_are_told():
    x = torch.zeros(64)
    assert aligned(x, x[4:])
    assert not aligned(x, x[1:])


@pytest.mark.parametrize("heads", [8, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hopper_launches_give_kernels_all_they_take(heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """On a machine that has Triton and no GPU: the kernels by shape, their arguments by name, and a programs' grid."""
    pytest.importorskip("triton.experimental.gluon")
    from trivium.ops.simplicial import hopper_decode_launch, hopper_launch

    launches: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []

    def record(kernel: Any, key: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        hash(key)
        launches.append((kernel.__name__, grid, dict(zip(kernel.arg_names, arguments, strict=True))))

    for module in (hopper_launch, hopper_decode_launch):
        monkeypatch.setattr(module, "launch", record)
        monkeypatch.setattr(module, "processors", lambda index: 132)
    q, k1, k2, v1, v2 = (torch.zeros(2, 150, n, 128, dtype=dtype) for n in (heads, 1, 1, 1, 1))
    o, lse = hopper_launch.hopper_forward(q, k1, k2, v1, v2, 64, 32, 0.125)
    assert (o.shape, lse.shape) == (q.shape, (2, heads, 150))
    name, grid, given = launches.pop()
    # Both warpgroups take heads of one query, or queries of one head.
    assert (name, grid) == ("forward", (132,) if heads == 8 else (76,))
    assert given["flags"].numel() == 2 * grid[0]
    # float16 has not the range for weights without a maximum.
    assert given["LIMIT"] == (hopper_launch.RANGE if dtype == torch.bfloat16 else 0)
    rings = (q[:, :1], k1[:, :64], v1[:, :64], k2[:, :32], v2[:, :32], torch.tensor([9, 300]))
    if heads == 8:
        hopper_decode_launch.run(*rings, 0.125)
        name, grid, given = launches.pop()
        assert (name, grid, given["slots1"], given["slots2"]) == ("decode", (4,), 64, 32)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "kv_heads", "width", "window2", "grid"),
    [
        (64, 128, 8, 8, 32, 16, 256),  # 8192 units, 32 a program
        (3, 100, 32, 2, 32, 16, 240),  # two blocks of heads of each query
        (2, 37, 16, 1, 32, 8, 74),
        (2, 2, 4, 4, 32, 16, 8),
        (2, 1, 4, 4, 32, 16, None),
        (64, 129, 8, 8, 32, 16, None),
        (2, 100, 4, 4, 32, 32, None),
        (2, 100, 4, 4, 64, 16, None),
    ],
)
def test_short_sequences_of_narrow_heads_keep_their_keys_in_shared_memory(
    batch, tokens, heads, kv_heads, width, window2, grid, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("triton.experimental.gluon")
    from trivium.ops.simplicial import hopper_launch

    launches: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []

    def record(kernel: Any, key: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launches.append((kernel.__name__, grid, dict(zip(kernel.arg_names, arguments, strict=True))))

    monkeypatch.setattr(hopper_launch, "launch", record)
    monkeypatch.setattr(hopper_launch, "processors", lambda index: 132)
    counts = (heads, kv_heads, kv_heads, kv_heads, kv_heads)
    q, k1, k2, v1, v2 = (torch.zeros(batch, tokens, n, width, dtype=torch.bfloat16) for n in counts)
    hopper_launch.hopper_forward(q, k1, k2, v1, v2, 128, window2, 0.125)
    name, programs, given = launches.pop()
    assert name == ("forward" if grid is None else "resident_forward")
    if grid is not None:
        assert programs == (grid,)
        assert (grid - 1) * given["each"] < given["units"] <= grid * given["each"]
        assert given["units"] == batch * kv_heads * given["units_i"] * given["HB"]
        assert given["TILES"] * 32 >= tokens
        assert given["flags"].numel() == 2 * grid


def test_registers_are_bounded_for_the_plain_form_of_width_32_and_on_nvidia_alone(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from trivium.ops.simplicial.triton_launch import tiles_for

    sizes: dict[str, Any] = {"group": 1, "short": 16, "wide": False}
    assert tiles_for("rows", width=32, plain=True, **sizes).options["maxnreg"] == 168
    assert "maxnreg" not in tiles_for("rows", width=32, **sizes).options
    assert "maxnreg" not in tiles_for("rows", width=64, plain=True, **sizes).options
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "maxnreg" not in tiles_for("rows", width=32, plain=True, **sizes).options


def test_whole_tiles_of_sums_go_by_the_copy_engine_where_there_is_one_and_they_fit(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from trivium.ops.simplicial import triton_launch

    def described(width: int, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
        call = triton_launch._Call(2, 100, 8, 2, width, long=40, short=16)
        sums = torch.zeros(4, 2, 100, 2, width)
        return *triton_launch._described(call, call.tiles("rows", dtype, plain=True), sums, dtype), sums

    monkeypatch.setattr(triton_launch, "adds_tiles", lambda index: False)
    assert described(64, torch.bfloat16)[:2] == (None, None)
    monkeypatch.setattr(triton_launch, "adds_tiles", lambda index: True)
    *tiles, sums = described(64, torch.bfloat16)
    for found, gradient in zip(tiles, sums[:2], strict=True):
        assert (found.shape, found.strides) == ([2, 100, 128], [12800, 128, 1])
        assert found.block_shape == [1, 64, 64]
        assert found.base.data_ptr() == gradient.data_ptr()
    for width, dtype in ((48, torch.bfloat16), (256, torch.bfloat16), (64, torch.float32)):
        assert described(width, dtype)[:2] == (None, None)
