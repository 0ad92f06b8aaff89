"""Captured steps: what goes through static buffers trains as plain steps do, and what cannot be captured is said."""

import json
import logging
import os
import signal

import numpy as np
import pytest
import torch

from tests.train.tiny import rows, tiny_config
from trivium.config import UserError
from trivium.data.stream import TrainStream
from trivium.mixers.base import MIXERS
from trivium.model.base import MODELS
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.model.layers import format_layers
from trivium.tasks.addition import AdditionConfig
from trivium.train.capture import CapturedSteps, Choice, EagerSteps, choose_capture
from trivium.train.config import TrainConfig
from trivium.train.distributed import World
from trivium.train.loop import train
from trivium.train.objectives import NextToken, Rollout
from trivium.train.optim import build_optimizer, set_learning_rates
from trivium.train.precision import Precision
from trivium.train.reads import reads, room
from trivium.train.step import Step
from trivium.train.stop import Interrupted

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TASK = AdditionConfig(max_digits=3, format="reversed")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA: torch sees no device")


def make(config, device: torch.device, precision: str = "float32", objective: NextToken | None = None):
    """Return a step on a new model of `config`, the same each time."""
    task = TASK.build()
    torch.manual_seed(0)
    model = config.build(model_context(task, config)).to(device).train()
    options = TrainConfig()
    optimizer = build_optimizer(model, options)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    arithmetic = Precision(precision, "asked for", device.type)
    return Step(
        model, objective or NextToken(), optimizer, scaler, list(model.parameters()), options.clip, arithmetic, World()
    )


def run(steps, count: int = 20, batch: int = 32, micro_batch: int | None = None) -> list[float]:
    """Return the losses and gradient norms of `count` steps."""
    task, found = TASK.build(), []
    stream, objective = TrainStream(task, batch, 0), steps.step.objective
    torch.manual_seed(1)
    with steps.running():
        for index in range(count):
            drawn = objective.decoding.view(stream.batch(index), task.alphabet.pad_id)
            weights = objective.weights(drawn)
            set_learning_rates(steps.step.optimizer, TrainConfig(warmup=count), index, 0.0)
            objective.begin_step(index / count, steps.device)
            options = {"longest": task.max_length - 1, "pad_id": task.alphabet.pad_id}
            passes = objective.reads(drawn, weights, micro_batch, **options)
            found.append(torch.stack(steps(passes, float(weights.sum()))))
    return torch.stack(found).flatten().tolist()


def repeat(run):
    """Stand for a graph where there is none: what a graph repeats, do again."""
    return run


@pytest.mark.parametrize("micro_batch", [None, 12])
def test_steps_through_static_buffers_train_as_plain_steps_do(micro_batch):
    config = DecoderConfig(width=16, heads=2, dropout=0.1)
    plain = run(EagerSteps(make(config, CPU), CPU), micro_batch=micro_batch)
    buffered = CapturedSteps(make(config, CPU), CPU, Choice(True, ""), record=repeat)
    assert run(buffered, micro_batch=micro_batch) == pytest.approx(plain, rel=1e-5)
    assert buffered._num_graphs() > 0


def test_once_a_shape_has_a_graph_others_have_theirs_at_their_second_step():
    step = make(DecoderConfig(width=16, heads=2), CPU)
    steps, graphs, task = CapturedSteps(step, CPU, Choice(True, ""), record=repeat), [], TASK.build()
    batches = {rows: TrainStream(task, rows, 0).batch(0) for rows in (3, 4, 5)}
    with steps.running():
        for rows in (3, 4, 4, 3, 3, 4, 5, 5):
            weights = step.objective.weights(batches[rows])
            steps(step.objective.reads(batches[rows], weights, None, longest=None, pad_id=0), float(weights.sum()))
            graphs.append(steps._num_graphs())
    assert graphs == [0, 0, 0, 0, 1, 2, 2, 3]


def test_a_roll_out_whose_temperature_falls_goes_through_static_buffers():
    config = DecoderConfig(width=16, heads=2)
    plain = run(EagerSteps(make(config, CPU, objective=Rollout(end=0.3)), CPU), 8, 8)
    buffered = CapturedSteps(make(config, CPU, objective=Rollout(end=0.3)), CPU, Choice(True, ""), record=repeat)
    assert run(buffered, 8, 8) == pytest.approx(plain, rel=1e-5)


def test_filled_up_batches_give_the_same_loss_from_few_shapes():
    task, objective = TASK.build(), NextToken()
    stream, config = TrainStream(task, 21, 3), DecoderConfig(width=16, heads=2)
    shapes = set()
    for index in range(6):
        batch = stream.batch(index)
        weights = objective.weights(batch)
        exact = reads(batch, weights, 7)
        filled = reads(batch, weights, 7, longest=task.max_length - 1, pad_id=task.alphabet.pad_id)
        shapes |= {tuple(x.shape for x in read if x is not None) for read in filled}
        assert all(len(np.unique(read.wanted_N)) == len(read.wanted_N) for read in filled)
        losses = [EagerSteps(make(config, CPU), CPU)(each, float(weights.sum())) for each in (exact, filled)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert len(shapes) <= 3


@pytest.mark.parametrize(("count", "wanted"), [(0, 0), (18, 18), (31, 31), (33, 34), (1000, 1024), (1025, 1088)])
def test_rooms_lie_close_above_what_they_hold(count, wanted):
    assert room(count) == wanted


def test_what_is_not_captured_is_said_and_recorded(caplog):
    def fails(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    choice = Choice(True, "")
    config = DecoderConfig(width=16, heads=2)
    plain = run(EagerSteps(make(config, CPU), CPU), 6)
    with caplog.at_level(logging.WARNING, logger="trivium"):
        assert run(CapturedSteps(make(config, CPU), CPU, choice, record=fails), 6) == pytest.approx(plain, rel=1e-5)
    (message,) = (entry.getMessage() for entry in caplog.records)
    assert not choice.captured
    assert "not permitted when stream is capturing" in choice.reason
    assert choice.reason in message
    with pytest.raises(UserError, match=r"train.capture: yes is not possible: .*not permitted"):
        run(CapturedSteps(make(config, CPU), CPU, Choice(True, ""), required=True, record=fails), 6)


def test_a_graph_is_chosen_for_one_process_on_a_cuda_device():
    precise, half = Precision("float32", "", "cuda"), Precision("float16", "", "cuda")
    assert choose_capture("auto", CUDA, World(), precise).captured
    assert not choose_capture("no", CUDA, World(), precise).captured
    for device, world, precision in ((CPU, World(), precise), (CUDA, World(0, 0, 2), precise), (CUDA, World(), half)):
        assert not choose_capture("auto", device, world, precision).captured
        with pytest.raises(UserError, match=r"train.capture: yes is not possible: .*; allowed: auto, no"):
            choose_capture("yes", device, world, precision)


def test_a_run_records_whether_its_steps_are_captured(tmp_path):
    train(tiny_config(steps=2, device="cpu"), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["capture"] == {"captured": False, "reason": "auto: graphs are of CUDA devices, this run is on cpu"}


# On a device.

MODELS_TO_CAPTURE = [example for name in MODELS.names() for example in MODELS.get(name).examples()]
MODELS_TO_CAPTURE += [
    DecoderConfig(width=24, heads=2, layers=format_layers((mixer,)))
    for name in MIXERS.names()
    for mixer in MIXERS.get(name).examples()
]


@on_cuda
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # fla's import of torch's compiler
@pytest.mark.parametrize("config", MODELS_TO_CAPTURE, ids=lambda config: f"{config.kind}-{config.layers}")
def test_captured_steps_give_the_losses_of_eager_ones(config):
    choice = Choice(True, "")
    eager, again = (run(EagerSteps(make(config, CUDA), CUDA)) for _ in range(2))
    captured = CapturedSteps(make(config, CUDA), CUDA, choice)
    found = run(captured)
    assert choice.captured, choice.reason
    # Kernels that add atomically do so in any order, and training magnifies what comes of it: of all mixers in one
    # model two eager runs differ by 1e-5 after eleven steps, by 1.2e-4 after twenty, by nothing with
    # torch.use_deterministic_algorithms. Where eager steps do not repeat themselves ten are compared, twenty elsewhere.
    steps = 20 if again == pytest.approx(eager, rel=1e-6) else 10
    assert found[: 2 * steps] == pytest.approx(eager[: 2 * steps], rel=1e-4)


@on_cuda
@pytest.mark.parametrize("micro_batch", [None, 12])
def test_captured_steps_keep_dropout_and_bfloat16(micro_batch):
    config, choice = DecoderConfig(width=32, heads=2, dropout=0.2), Choice(True, "")
    eager = run(EagerSteps(make(config, CUDA, "bfloat16"), CUDA), micro_batch=micro_batch)
    captured = run(CapturedSteps(make(config, CUDA, "bfloat16"), CUDA, choice), micro_batch=micro_batch)
    assert choice.captured, choice.reason
    assert captured == pytest.approx(eager, rel=1e-2)


@on_cuda
@pytest.mark.parametrize("mixer", ["attention", "simplicial(window1=6, window2=3)", "gru"])
def test_captured_roll_outs_follow_their_temperature(mixer):
    config, choice = DecoderConfig(width=32, heads=2, layers=f"{mixer}*2"), Choice(True, "")
    eager = run(EagerSteps(make(config, CUDA, objective=Rollout(end=0.3)), CUDA))
    captured = run(CapturedSteps(make(config, CUDA, objective=Rollout(end=0.3)), CUDA, choice))
    assert choice.captured, choice.reason
    assert captured == pytest.approx(eager, rel=1e-3)


class Waits(torch.nn.Module):
    """A model whose forward pass does what a graph cannot."""

    def __init__(self, model, wait):
        super().__init__()
        self.model, self.wait = model, wait

    def forward(self, tokens_BT, **others):
        self.wait(tokens_BT)
        return self.model(tokens_BT, **others)


@on_cuda
@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()], ids=["item", "device"])
def test_a_model_that_waits_for_the_device_trains_eagerly_and_says_so(wait, caplog):
    config, choice = DecoderConfig(width=16, heads=2, dropout=0.1), Choice(True, "")
    eager = run(EagerSteps(make(config, CUDA), CUDA))
    step = make(config, CUDA)
    object.__setattr__(step, "forward", Waits(step.forward, wait))
    with caplog.at_level(logging.WARNING, logger="trivium"):
        found = run(CapturedSteps(step, CUDA, choice))
    assert not choice.captured
    assert len(caplog.records) == 1
    assert found == pytest.approx(eager, rel=1e-4)


@on_cuda
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_captured_run_resumes_where_it_was_and_its_evaluations_see_its_weights(tmp_path, monkeypatch, dropout):
    config = tiny_config(steps=24, device="cuda", model={"dropout": dropout})
    train(config, tmp_path / "whole")
    record = json.loads((tmp_path / "whole" / "environment.json").read_text())
    assert record["capture"]["captured"]
    stop = TrainStream.batch

    def interrupted(self, step, *others):
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return stop(self, step, *others)

    monkeypatch.setattr(TrainStream, "batch", interrupted)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts")
    monkeypatch.undo()
    train(config, tmp_path / "parts")
    eager = tiny_config(steps=24, device="cuda", model={"dropout": dropout}, capture="no")
    train(eager, tmp_path / "eager")
    for split in ("train", "validation"):
        whole, parts, plain = (
            [row["loss"] for row in rows(tmp_path / name, split)] for name in ("whole", "parts", "eager")
        )
        assert parts == pytest.approx(whole, rel=1e-4)
        assert plain == pytest.approx(whole, rel=1e-4)
