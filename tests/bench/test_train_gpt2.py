"""Training at GPT-2's size on a GPU: what is timed, told on any machine at a size that takes a moment."""

import dataclasses
from typing import Any, cast

import numpy as np
import pytest
import torch

from trivium.bench import train_gpt2
from trivium.bench.gates import WrongResult
from trivium.config import UserError
from trivium.model.context import model_context
from trivium.train import objectives

TASK: Any = train_gpt2.RandomTokensConfig(symbols=90, tokens=24)


def small(layers_text: str = "") -> train_gpt2.LongShape:
    return train_gpt2.LongShape("124M", 16, 2, 2, 24, 4, TASK, 14, "cpu", layers_text)


@pytest.fixture
def _on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "LARGE", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(train_gpt2, "matrix_rate", lambda device: 1e9)
    monkeypatch.setattr(train_gpt2, "run_trainer", lambda *arguments, **options: 8.0)


@pytest.mark.usefixtures("_on_a_processor")
def test_a_row_has_rates_utilisation_and_the_ratio_to_trainer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(train_gpt2.LONG_SHAPES, "124M", small())
    results = train_gpt2.bench_gpt2("124M", repeats=1, threads=1)
    (row,) = results["rows"]
    assert row["ratio"] == pytest.approx(row["steps_per_second"] / 8)
    assert row["tokens_per_second"] == pytest.approx(row["steps_per_second"] * 4 * 24)
    assert row["utilisation"] == pytest.approx(row["flops_per_token"] * row["tokens_per_second"] / 1e9)
    assert row["operators"]["vocabulary_loss"] == "torch"
    assert results["gates"]["124M"]["trivium"] == pytest.approx(results["gates"]["124M"]["trainer"], rel=1e-5)


@pytest.mark.usefixtures("_on_a_processor")
def test_the_hybrid_is_timed_alone_with_the_share_of_its_operator(monkeypatch: pytest.MonkeyPatch):
    layers = "attention(bias=true)*1 + simplicial(bias=true, window1=9, window2=3)*1"
    monkeypatch.setitem(train_gpt2.LONG_SHAPES, "hybrid", small(layers))
    (row,) = train_gpt2.bench_gpt2("hybrid", repeats=1, threads=1)["rows"]
    assert "trainer" not in row
    share = row["simplicial"]
    seconds = share["layers"] * (share["forward_seconds"] + share["backward_seconds"])
    assert share["share"] == pytest.approx(seconds * row["steps_per_second"])
    assert f"{share['share']:.0%} of the step" in row["note"]


def test_rows_of_random_tokens_are_a_pure_function_of_their_index():
    task = TASK.build()
    batch = task.gather("train", np.array([3, 1]))
    assert batch.tokens_BT.shape == (2, 24)
    assert (batch.targets_BT[:, :-1] == batch.tokens_BT[:, 1:]).all()
    assert (batch.tokens_BT[1] == task.gather("train", np.array([1])).tokens_BT[0]).all()
    assert (batch.tokens_BT[0] != batch.tokens_BT[1]).any()
    example = task.example("train", 3)
    ids = task.alphabet.encode(example.prompt) + task.alphabet.encode(example.answer)
    assert ids == [*batch.tokens_BT[0].tolist(), int(batch.targets_BT[0, -1])]


def test_the_gpu_shape_is_gpt2_small():
    shape = train_gpt2.LONG_SHAPES["124M"]
    config, task = shape.model(), dataclasses.replace(cast(Any, shape.task)).build()
    context = model_context(task, config)
    assert context.vocab_size == 50_257
    assert config.num_params(context) == pytest.approx(124.4e6, rel=0.001)
    # 6 FLOPs for each weight in a product, and attention's own.
    weights = 12 * 12 * 768**2 + 50_257 * 768
    assert train_gpt2.training_flops(shape) == pytest.approx(6 * weights + 12 * 6 * 1025 * 768, rel=1e-6)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="CUDA"):
        train_gpt2.bench_gpt2("124M")


def test_other_losses_than_trainers_model_end_the_benchmark(monkeypatch: pytest.MonkeyPatch):
    true = train_gpt2.gpt2_like

    def changed(*arguments: Any) -> Any:
        model = true(*arguments)
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.bias += 0.5
        return model

    monkeypatch.setattr(train_gpt2, "gpt2_like", changed)
    with pytest.raises(WrongResult, match="losses differ"):
        train_gpt2.check_losses(small())
