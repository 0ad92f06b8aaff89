"""What only a GPU can show of 2-simplicial attention inside a model: compiled, checkpointed, in autocast, captured."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from trivium.mixers.base import MixerContext
from trivium.mixers.simplicial import SimplicialConfig
from trivium.ops import simplicial_attention
from trivium.ops.simplicial import hopper_support

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_hopper = pytest.mark.skipif(hopper_support.missing() is not None, reason=f"Hopper: {hopper_support.missing()}")
kernels = pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=on_hopper)])


def draw(*counts: int, tokens: int = 70, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = (torch.randn(2, tokens, count, 64, device="cuda", generator=generator) for count in counts)
    return [x.to(dtype).requires_grad_() for x in drawn]


def mixer(backend: str, **options: Any) -> Any:
    torch.manual_seed(0)
    context = MixerContext(width=256, heads=4, max_length=200, backends={"simplicial": backend})
    return SimplicialConfig(window1=40, window2=16, kv_heads=1, **options).build(context).to("cuda", torch.bfloat16)


def near(found: Tensor, wanted: Tensor) -> bool:
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm()) <= 2e-2 * float(wanted.norm())


@on_hopper
def test_the_hopper_operators_are_registered_as_torch_wants():
    from trivium.ops.simplicial import hopper_decode_launch, hopper_launch

    q, k1, k2, v1, v2 = draw(4, 1, 1, 1, 1)
    torch.library.opcheck(hopper_launch._forward.op, (q, k1, v1, k2, v2, None, 40, 16, 0.125, 0))
    rings = [x.detach() for x in (q[:, :1], k1[:, :40], v1[:, :40], k2[:, :32], v2[:, :32])]
    torch.library.opcheck(hopper_decode_launch._decode.op, (*rings, torch.tensor([300, 20], device="cuda"), 0.125))


@on_a_gpu
@kernels
def test_later_calls_of_a_shape_read_their_own_tensors_wherever_they_lie(backend: str):
    # The second launch of a shape skips what Triton derives from its arguments; the last one's addresses forbid that.
    windows: dict[str, Any] = {"window1": 40, "window2": 16}
    for seed, shift in enumerate((0, 0, 0, 1)):
        generator = torch.Generator("cuda").manual_seed(seed)
        flat = [torch.randn(2 * 70 * n * 64 + shift, device="cuda", generator=generator) for n in (4, 2, 2, 2, 2)]
        inputs = [x.bfloat16()[shift:].view(2, 70, -1, 64).requires_grad_() for x in flat]
        wide = [x.detach().float().requires_grad_() for x in inputs]
        results = []
        for name, tensors in ((backend, inputs), ("torch", wide)):
            o = simplicial_attention(*tensors, **windows, backend=name)
            results.append([o, *torch.autograd.grad(o.float().square().sum(), tensors)])
        assert all(near(found, wanted) for found, wanted in zip(*results, strict=True))


@on_a_gpu
@kernels
# Importing Inductor runs into torch's own deprecation.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_mixer_compiled_into_one_graph_equals_the_plain_one(backend: str):
    plain = mixer(backend)
    x_BTD = torch.randn(2, 70, 256, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(plain, fullgraph=True)
    results = []
    for function in (plain, compiled):
        y_BTD = function(x_BTD)[0]
        results.append([y_BTD, *torch.autograd.grad(y_BTD.float().square().sum(), list(plain.parameters()))])
    assert all(near(found, wanted) for wanted, found in zip(*results, strict=True))


@on_a_gpu
@kernels
def test_activation_checkpoints_change_nothing(backend: str):
    inputs = draw(4, 2, 2, 2, 2)

    def attend(*tensors: Tensor) -> Tensor:
        return simplicial_attention(*tensors, window1=40, window2=16, backend=backend)  # pyright: ignore

    plain = attend(*inputs)
    again = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [torch.autograd.grad(o.float().square().sum(), inputs) for o in (plain, again)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@on_a_gpu
@kernels
def test_autocast_gives_the_kernels_what_the_projections_gave(backend: str):
    half, wide = mixer(backend), mixer(backend).float()
    x_BTD = torch.randn(2, 70, 256, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y_BTD = wide(x_BTD)[0]
    assert near(y_BTD, half(x_BTD.bfloat16())[0])
    assert torch.autograd.grad(y_BTD.float().sum(), list(wide.parameters()))[0].dtype == torch.float32


@on_a_gpu
@torch.no_grad()
@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_a_captured_step_of_the_mixer_continues_rows_of_unequal_lengths(form: Any):
    layer = mixer("auto", form=form, rotary=form == "determinant")
    lengths, steps = [70, 3, 41], 50
    x_BTD = torch.randn(3, 70 + steps, 256, device="cuda", dtype=torch.bfloat16)
    alone = [layer(x_BTD[b : b + 1, : n + steps])[0][0, n:] for b, n in enumerate(lengths)]
    state = layer.init_state(3, 200, "cuda", torch.bfloat16)
    _, state = layer(x_BTD[:, :70], state, lengths_B=torch.tensor(lengths, device="cuda"))
    rows = [x_BTD[b, n : n + steps] for b, n in enumerate(lengths)]
    next_BTD = torch.stack([row[0] for row in rows])[:, None].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = [layer(next_BTD, state)[0][:, 0].clone()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    next_BTD.copy_(torch.stack([row[1] for row in rows])[:, None])
    with torch.cuda.graph(graph):
        y_BTD, _ = layer(next_BTD, state)
    for step in range(1, steps):
        next_BTD.copy_(torch.stack([row[step] for row in rows])[:, None])
        graph.replay()
        outputs.append(y_BTD[:, 0].clone())
    for b, wanted in enumerate(alone):
        assert near(torch.stack([o[b] for o in outputs]), wanted)


@on_hopper
@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_assembler_drops_no_product_of_the_kernels_in_use(width: int, monkeypatch: pytest.MonkeyPatch):
    """docs/kernels.md tells what it leaves where it drops one, and in which loops it does."""
    from trivium.ops.simplicial import launches

    monkeypatch.setattr(launches, "_compiled", {})
    for backend in ("triton", "hopper"):
        for heads, kv_heads, windows in ((16, 1, (128, 32)), (2, 2, (128, 16))):
            for tokens in (200, 100):
                shapes = [(1, tokens, count, width) for count in (heads, *[kv_heads] * 4)]
                inputs = [torch.randn(x, device="cuda", dtype=torch.bfloat16, requires_grad=True) for x in shapes]
                o = simplicial_attention(*inputs, window1=windows[0], window2=windows[1], backend=backend)
                torch.autograd.grad(o, inputs, torch.randn_like(o))
    code = [(compiled.metadata.name, compiled.asm["sass"]) for compiled, _ in launches._compiled.values()]
    wanted = {"forward", "forward_kernel", "rows_kernel"} | ({"resident_forward"} if width == 32 else set())
    assert {name for name, text in code if "HGMMA" in text} >= wanted
    assert not [name for name, text in code if "gdesc[URZ]" in text]
