"""The row of the training benchmark for a GPU: three programs, their medians and ratios, told on any machine."""

import dataclasses

import pytest
import torch

from trivium.bench import train, train_gpu
from trivium.tasks.addition import AdditionConfig


@pytest.fixture
def small(monkeypatch):
    """A shape that takes a moment on a processor, and peers that take few steps and are not compiled."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(train_gpu, "PEER_STEPS", {"trainer": 2, "loop": 2})
    return train.Shape("6.3M", 16, 1, 2, 24, 4, AdditionConfig(max_digits=2, zero_pad=True), 12)


def test_a_row_has_the_medians_of_three_programs_and_two_ratios(small):
    row = train_gpu.time_on_gpu(small, repeats=1, threads=1, steps=12)
    assert row["ratio"] == pytest.approx(row["trivium"] / row["trainer"])
    assert row["ratio_to_loop"] == pytest.approx(row["trivium"] / row["loop"])
    assert f"bare loop: {row['loop']:.1f}" in row["note"]
    assert [len(row[f"{name}_repeats"]) for name in ("trivium", "trainer", "loop")] == [1, 1, 1]


def test_the_bare_loop_trains_the_same_model_on_the_same_problems(small, monkeypatch):
    losses = []

    def seen(model):
        def forward(**batch):
            made = model(**batch)
            losses.append(float(made.loss.detach()))
            return made

        return forward

    monkeypatch.setattr(torch, "compile", seen)
    train_gpu.run_loop(small, 12)
    assert losses[0] == pytest.approx(train.check_first_loss(small)["trainer"], rel=1e-2)  # in bfloat16
    assert losses[-1] < losses[0]


def test_the_gpu_shape_is_the_published_one():
    shape = train.SHAPES["6.3M"]
    gate = train.check_first_loss(dataclasses.replace(shape, batch=2, device="cpu"))
    assert gate["parameters"] == pytest.approx(6.33e6, rel=0.005)
    assert gate["tokens"] == 18
