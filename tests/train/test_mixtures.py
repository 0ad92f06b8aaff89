"""Mixtures of experts: switched on without a jolt, balanced, their load told, and continued exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny import broken_at, rows, tiny_config
from trivium.config import UserError
from trivium.mixers.routing import Switched
from trivium.model.base import ModelContext
from trivium.model.decoder import DecoderConfig
from trivium.train.config import RunConfig, TrainConfig
from trivium.train.loop import train
from trivium.train.mixtures import mixtures_of
from trivium.train.optim import build_optimizer, decays
from trivium.train.prepare import prepare
from trivium.train.run import load

CONTEXT = ModelContext(vocab_size=14, max_length=13)
FEEDFORWARDS = {"experts": 3, "layers": "attention*2"}
HEADS = {"layers": "attention*1 + simplicial_experts(window1=9, window2=3, experts=3, bias=true)*1"}
KINDS = pytest.mark.parametrize("kind", [FEEDFORWARDS, HEADS], ids=["feedforwards", "heads"])


def build(kind: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return DecoderConfig(**{"width": 16, "heads": 2, **kind, **options}).build(CONTEXT).double()


def tokens(rows_: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(14, (rows_, length), generator=torch.Generator().manual_seed(1))


def losses(model: Any, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        model(tokens())[0].logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@KINDS
def test_switching_on_keeps_the_function_and_copies_the_moments(kind: dict[str, Any]):
    model = build(kind)
    mixtures = mixtures_of(model, TrainConfig(experts_from=5))
    optimizer = build_optimizer(model, TrainConfig())
    mixtures.resume(0)
    losses(model, optimizer)
    before = model(tokens())[0]
    names = list(mixtures.named)
    assert [mixtures.advance(step, optimizer) for step in (4, 5, 6)] == [False, True, False]
    torch.testing.assert_close(model(tokens())[0], before, rtol=0, atol=1e-12)
    for each in mixtures.named.values():
        for parameter in (p for stack in each.stacked() for p in stack.parameters()):
            moments = optimizer.state[parameter]["exp_avg_sq"]
            assert all(torch.equal(x[0], x[-1]) for x in (parameter, moments))
            assert moments[0].any()
    losses(model, optimizer)
    stack = model.get_submodule(names[-1]).stacked()[0].weight
    assert not torch.equal(stack[0], stack[1])  # from here on they differ


@KINDS
def test_before_the_switch_other_experts_change_nothing(kind: dict[str, Any]):
    model = build(kind)
    mixtures_of(model, TrainConfig(experts_from=5)).resume(5)
    before = model(tokens())[0]
    with torch.no_grad():
        for each in (module for module in model.modules() if isinstance(module, Switched)):
            for parameter in (p for stack in each.stacked() for p in stack.parameters()):
                parameter[1:] = 7
    assert torch.equal(model(tokens())[0], before)


@KINDS
def test_a_row_is_what_it_is_alone_whatever_its_batch(kind: dict[str, Any]):
    model = build(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = tokens(7)
    lengths = torch.tensor([12, 1, 5, 12, 3, 9, 2])
    whole, _ = model(batch, lengths_B=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model(batch[row : row + 1, :length])
        torch.testing.assert_close(whole[row, :length], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("top", [1, 2])
def test_the_penalty_is_one_for_an_even_load_and_pushes_towards_it(top: int):
    model = build(FEEDFORWARDS, experts_per_token=top)
    mixtures = mixtures_of(model, TrainConfig(balance=1.0))
    for each in mixtures.named.values():
        torch.nn.init.zeros_(each.router.weight)
    model.train()
    model(tokens())
    penalty = mixtures.penalty()
    assert isinstance(penalty, torch.Tensor)
    assert float(penalty.detach()) == pytest.approx(1)  # even probabilities, whatever the places
    with torch.no_grad():
        for each in mixtures.named.values():
            each.router.weight.normal_()
    found = []
    optimizer = torch.optim.SGD([each.router.weight for each in mixtures.named.values()], lr=0.5)
    for _ in range(60):
        mixtures.take_load()
        model(tokens())
        penalty = mixtures.penalty()
        assert isinstance(penalty, torch.Tensor)
        penalty.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(penalty.detach()))
    assert found[-1] < found[0]
    load = mixtures.take_load()
    shares = [load[f"load.blocks.0.feedforward.{index}"] for index in range(3)]
    assert sum(shares) == pytest.approx(1)
    assert load["balance.blocks.0.feedforward"] == pytest.approx(3 * sum(share**2 for share in shares))


def test_the_router_of_one_expert_a_token_learns():
    model = build(FEEDFORWARDS, experts_per_token=1)
    with torch.no_grad():
        model.blocks[0].feedforward.output.weight[1:] *= 2  # experts that differ
    model(tokens())[0].logsumexp(-1).mean().backward()
    assert model.blocks[0].feedforward.router.weight.grad.norm() > 0


@KINDS
@pytest.mark.parametrize("broken", [5, 6, 8])
def test_a_run_that_switches_continues_exactly(
    kind: dict[str, Any], broken: int, continued: Callable[[RunConfig, int], Path]
):
    # Rows of metrics and checkpoints fall on different steps, so that the load in between is kept.
    folder = continued(tiny_config(kind, experts_from=6, log_every=4, save_every=3), broken)
    first, second, third = rows(folder, "train")
    assert not any(name.startswith("load.") for name in first)
    for row in (second, third):
        (name, *_) = (name for name in row if name.startswith("balance."))
        shares = [value for key, value in row.items() if key.startswith(name.replace("balance", "load"))]
        assert sum(shares) == pytest.approx(1)


def test_a_run_that_ends_before_the_switch_saves_experts_that_are_copies(tmp_path: Path):
    config = tiny_config(FEEDFORWARDS, experts_from=100)
    train(config, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    stack = tensors["blocks.0.feedforward.input.weight"]
    assert torch.equal(stack[0], stack[2])
    model, _, _ = load(tmp_path / "run")
    assert all(module.on for module in model.modules() if isinstance(module, Switched))


def test_a_checkpoint_from_before_the_switch_reads_as_its_first_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_config(FEEDFORWARDS, experts_from=100)
    with monkeypatch.context() as patch:
        broken_at(patch, 5)
        with pytest.raises(RuntimeError, match="died"):
            train(config, tmp_path / "run")
    model, _, _ = load(tmp_path / "run")
    stack: Any = model.get_parameter("blocks.0.feedforward.input.weight")
    assert torch.equal(stack[0], stack[2])


def test_biases_of_experts_do_not_decay():
    assert not any("bias" in name for name in decays(build(FEEDFORWARDS)))
    assert "blocks.0.feedforward.input.weight" in decays(build(FEEDFORWARDS))


def test_a_switch_without_experts_is_refused():
    with pytest.raises(UserError, match="the model has no mixture of experts"):
        prepare(tiny_config(experts_from=5))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's compiler imports it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # and looks at it
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@KINDS
def test_a_compiled_model_keeps_penalty_and_load(kind: dict[str, Any], recompute: bool):
    torch._dynamo.reset()
    model = build(kind, checkpoint_activations=recompute, backends={"simplicial": "reference"}).train()
    compiled: Any = torch.compile(model, backend="aot_eager")
    mixtures = mixtures_of(model, TrainConfig())
    found = []
    for forward in (model, compiled):
        mixtures.take_load()
        (forward(tokens())[0].logsumexp(-1).mean() + mixtures.penalty()).backward()
        routers = [torch.clone(each.router.weight.grad) for each in mixtures.named.values()]  # pyright: ignore
        model.zero_grad()
        found.append((routers, mixtures.take_load()))
    for mine, wanted in zip(*(routers for routers, _ in found), strict=True):
        torch.testing.assert_close(mine, wanted)
    assert found[0][1] == pytest.approx(found[1][1])
