"""Keys are asked for after their pairs, and the label of a query is the value of its key."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.recall import RecallConfig, distinct_below


def test_the_label_of_a_query_is_the_value_of_its_key():
    task = RecallConfig(vocabulary=64, pairs=6, queries=4, min_length=20, max_length=40).build()
    batch = task.batch("train", 0, 50)
    for tokens, targets, weights in zip(batch.tokens_BT, batch.targets_BT, batch.weights_BT, strict=True):
        value_of = dict(zip(tokens[:12:2].tolist(), tokens[1:12:2].tolist(), strict=True))
        assert len(value_of) == 6
        places = np.flatnonzero(weights)
        assert len(places) == len({int(tokens[place]) for place in places}) == 4
        assert places.min() >= 12
        assert all(value_of[int(tokens[place])] == targets[place] for place in places)
        others = np.setdiff1d(np.arange(12, len(tokens)), places)
        assert not set(tokens[others].tolist()) & set(range(32)), "what is no query is no key"


def gaps(power: float) -> np.ndarray:
    task = RecallConfig(vocabulary=64, pairs=2, queries=1, min_length=44, max_length=44, gap_power=power).build()
    return task.batch("train", 0, 4000).weights_BT.argmax(axis=1) - 4


def test_gaps_follow_their_power_law():
    uniform = np.bincount(gaps(1.0), minlength=40)
    assert abs(uniform - 100).max() < 50
    near = np.bincount(gaps(0.01), minlength=40)
    wanted = np.arange(1, 41) ** -0.99
    assert abs(near - 4000 * wanted / wanted.sum()).max() < 5 * near.max() ** 0.5


def test_which_pair_is_asked_for_does_not_depend_on_where_it_stands():
    task = RecallConfig(vocabulary=64, pairs=4, queries=1, min_length=10, max_length=10).build()
    batch = task.batch("train", 0, 4000)
    asked = batch.tokens_BT[np.arange(4000), batch.weights_BT.argmax(axis=1)]
    counts = (batch.tokens_BT[:, 0:8:2] == asked[:, None]).sum(axis=0)
    assert abs(counts - 1000).max() < 150
    assert abs(np.bincount(asked, minlength=32) - 125).max() < 70


def test_sets_of_different_numbers_are_equally_likely():
    words = np.random.default_rng(0).integers(0, 2**64, size=(3, 20000), dtype=np.uint64)
    chosen = np.sort(distinct_below(words, 5), axis=0)
    assert (np.diff(chosen, axis=0) > 0).all()
    _, counts = np.unique(chosen, axis=1, return_counts=True)
    assert len(counts) == 10
    assert abs(counts - 2000).max() < 250


def test_a_problem_can_be_typed():
    task = RecallConfig(vocabulary=64, pairs=2, min_length=6, max_length=12).build()
    example = task.parse("k1 v9 k2 v3  v30 k2 k1")
    assert example.answer == "v3v9<end>"
    assert example.tags == {"length": 7, "pairs": 2}
    for wrong in ("k1 v9 k1 v3 k1", "k1 v9 k2 v3 k4", "k1 v9 k2 v3", "k1 k2 k2 v3 k1", "k1 v9", "k1v9k2v3k1<end>"):
        with pytest.raises(UserError, match="expected"):
            task.parse(wrong)


def test_a_large_vocabulary_is_read_symbol_by_symbol():
    task = RecallConfig().build()
    assert len(task.alphabet) == 8193
    ids = task.alphabet.encode("k1k10k4095v4095<end>")
    assert [task.alphabet.symbols[index] for index in ids] == ["k1", "k10", "k4095", "v4095", "<end>"]
    with pytest.raises(UserError, match=r"'w' at place 3 .* \.\.\. 8193 symbols"):
        task.alphabet.encode("k1w")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocabulary": 7}, "even number"),
        ({"pairs": 0}, "pairs: expected 1 to 4096"),
        ({"queries": 5}, "queries: expected 1 to 4, the pairs"),
        ({"min_length": 11}, "min_length: expected 12"),
        ({"gap_power": 0.0}, "gap_power"),
    ],
)
def test_wrong_configs_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        RecallConfig(**changes)
