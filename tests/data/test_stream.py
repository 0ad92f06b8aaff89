"""The order of training problems: the same whenever a step is asked for, and however many processes share it."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.data.stream import TrainStream
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.group_words import GroupWordsConfig

ENDLESS = AdditionConfig(max_digits=4).build()
FINITE = AdditionConfig(max_digits=4, train_examples=10).build()


@pytest.mark.parametrize("task", [ENDLESS, FINITE])
def test_a_step_is_the_same_in_a_new_stream(task):
    stream = TrainStream(task, 7, seed=3)
    steps = [stream.indices(step) for step in range(12)]
    for step in (11, 0, 5, 4):
        assert (TrainStream(task, 7, seed=3).indices(step) == steps[step]).all()
        assert (stream.indices(step) == steps[step]).all()


def test_an_endless_stream_never_repeats_an_index_within_or_across_seeds():
    indices = [TrainStream(ENDLESS, 5, seed).indices(step) for seed in (0, 1, 2) for step in range(6)]
    assert len(set(np.concatenate(indices).tolist())) == 90
    assert indices[6][0] == 1 << 40


def test_a_finite_stream_shows_everything_once_an_epoch_in_a_new_order():
    stream = TrainStream(FINITE, 4, seed=1)
    assert stream.examples_in_epoch == 10
    read = np.concatenate([stream.indices(step) for step in range(10)])
    epochs = read.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not (np.concatenate([TrainStream(FINITE, 4, 2).indices(step) for step in range(10)]) == read).all()


def test_a_batch_larger_than_an_epoch_goes_round():
    indices = TrainStream(FINITE, 25).indices(0)
    assert np.bincount(indices).tolist() == pytest.approx([2.5] * 10, abs=0.5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_slices_of_all_processes_together_are_the_batch(world):
    stream = TrainStream(ENDLESS, 8, seed=2)
    whole = stream.batch(4)
    slices = [stream.batch(4, rank, world) for rank in range(world)]
    assert sum(map(len, slices)) == len(whole) == 8
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    rows = [(part, b) for part in slices for b in range(len(part))]
    for b, (part, own) in enumerate(rows):
        length = whole.lengths_B[b]
        assert part.lengths_B[own] == length
        assert (part.tokens_BT[own, :length] == whole.tokens_BT[b, :length]).all()
        assert (part.targets_BT[own, :length] == whole.targets_BT[b, :length]).all()
        assert not part.weights_BT[own, length:].any()


def test_a_batch_in_tokens_holds_more_of_a_stages_shorter_problems():
    task = GroupWordsConfig(group="S5", max_length=18).build()
    stream = TrainStream(task, 180 // 18, seed=1, batch_tokens=180)
    assert [len(stream.batch(5, stage=stage)) for stage in (0, 3, 10)] == [10, 60, 18]
    steps = np.concatenate([stream.indices(step, stage=3) for step in range(4)])
    assert steps.tolist() == [(1 << 40) + place for place in range(240)]
    assert len(TrainStream(task, 10).batch(5, stage=3)) == 10


def test_impossible_batches_and_seeds_are_refused():
    with pytest.raises(UserError, match="batch"):
        TrainStream(ENDLESS, 0)
    with pytest.raises(UserError, match="seed"):
        TrainStream(ENDLESS, 4, seed=-1)
    with pytest.raises(UserError, match="cannot be shared among 5"):
        TrainStream(ENDLESS, 4).batch(0, 0, 5)
