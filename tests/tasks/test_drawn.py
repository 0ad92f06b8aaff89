"""What the generated tasks share: stages, lengths, splits, and the words of problems that people type."""

import numpy as np
import pytest

from tests.contracts.task_checks import assert_equal
from trivium.config import UserError
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import SPLITS, Task
from trivium.tasks.copy import CopyConfig
from trivium.tasks.drawn import prompt_hashes
from trivium.tasks.group_words import GroupWordsConfig
from trivium.tasks.modular_arithmetic import ModularArithmeticConfig
from trivium.tasks.recall import RecallConfig

STAGED = [
    (GroupWordsConfig(group="S3", max_length=10), "length", 6),
    (CopyConfig(max_length=10), "length", 4),
    (ModularArithmeticConfig(max_length=8, brackets=True), "length", 5),
    (RecallConfig(vocabulary=32, pairs=3, min_length=9, max_length=24), "length", 12),
    (AdditionConfig(max_digits=4), "digits", 2),
]
CASES = pytest.mark.parametrize(("config", "tag", "stage"), STAGED, ids=lambda value: getattr(value, "kind", None))


def check_a_stage_holds_only_its_lengths(task: Task, tag: str, stage: int) -> None:
    """A stage reaches its length and no further, in problems that lie in the same split as in the whole task."""
    for split in ("train", "validation"):
        examples = task.examples(split, np.arange(40), stage)
        assert max(example.tags[tag] for example in examples) == stage
        assert examples[3] == task.example(split, 3, stage)
        assert_equal(task.batch(split, 2, 6, stage), task.collate(examples[2:8]))
        indices = task.distinct(split, 5, stage)
        assert len({task.canonical(task.example(split, int(index), stage)) for index in indices}) == len(indices)
    in_train = {task.canonical(example) for example in task.examples("train", np.arange(400))}
    in_train |= {task.canonical(example) for example in task.examples("train", np.arange(400), stage)}
    for s in (0, stage):
        assert in_train.isdisjoint(task.canonical(e) for e in task.examples("validation", np.arange(60), s))


@CASES
def test_a_stage_holds_only_its_lengths(config, tag, stage):
    task = config.build()
    check_a_stage_holds_only_its_lengths(task, tag, stage)
    assert max(example.tags[tag] for example in task.examples("train", np.arange(200))) > stage


def test_a_stage_that_is_forgotten_is_caught():
    task = GroupWordsConfig(group="S3", max_length=10).build()
    task.staged = lambda stage: task
    with pytest.raises(AssertionError):
        check_a_stage_holds_only_its_lengths(task, "length", 6)


@CASES
def test_batches_that_follow_each_other_are_those_that_are_asked_for_alone(config, tag, stage):
    in_order, alone = config.build(), config.build()
    for s in (0, stage):
        for start in range(0, 6000, 900):
            batch = in_order.batch("train", start, 900, s)
            assert_equal(
                batch, alone.gather("train", np.arange(start, start + 900)[::-1], s).take(np.arange(900)[::-1])
            )
            batch.tokens_BT[:] = 0  # what a caller does to its batch stays out of the next
        # Another split's are never cut from the block of training.
        assert_equal(in_order.batch("test", 5500, 50, s), alone.batch("test", 5500, 50, s))


@CASES
def test_a_task_can_be_read_at_one_length_beyond_its_own(config, tag, stage):
    task, longer = config.build(), config.build().at_length(30)
    assert {example.tags[tag] for example in longer.examples("test", np.arange(5))} == {30}
    assert longer.alphabet == task.alphabet
    # Short problems belong to the split that they belong to in the task itself.
    train = {task.canonical(example) for example in task.examples("train", np.arange(2000))}
    same = task.at_length(stage)
    assert train.isdisjoint(same.canonical(example) for example in same.examples("test", np.arange(30)))


def test_lengths_that_a_task_does_not_have_are_refused():
    task = RecallConfig(vocabulary=32, pairs=3, min_length=9, max_length=24).build()
    with pytest.raises(UserError, match="expected 9"):
        task.at_length(8)
    with pytest.raises(UserError, match="whole task"):
        task.staged(24)
    with pytest.raises(UserError, match="whole task"):
        AdditionConfig(max_digits=2).build().staged(2)


def test_a_split_without_problems_is_refused_at_once():
    with pytest.raises(UserError, match=r"test split is empty.*only 6 problems of lengths 1 to 2"):
        GroupWordsConfig(group="Z2", max_length=2).build()
    task = GroupWordsConfig(group="Z2", max_length=40).build()
    with pytest.raises(UserError, match="split is empty"):
        task.staged(1)
    with pytest.raises(UserError, match="test split is empty"):
        task.at_length(1)
    words = GroupWordsConfig(group="Z2", max_length=40, test_fraction=0.6, validation_fraction=0.001).build()
    words = words.at_length(3)
    assert len(words.distinct("test", 9)) < 8
    for _ in range(2):
        with pytest.raises(UserError, match="validation split is empty"):
            words.distinct("validation", 1)


def test_the_split_of_a_problem_depends_on_neither_seed_nor_width():
    short = GroupWordsConfig(group="S3", min_length=4, max_length=4).build()
    long = GroupWordsConfig(group="S3", max_length=30, seed=9).build()
    hashes = {}
    for task in (short, long):
        for split in SPLITS:
            drawn = task.draw(split, np.arange(800))
            for prompt, length, found in zip(
                drawn.prompts_BP.tolist(), drawn.lengths_B.tolist(), prompt_hashes(drawn).tolist(), strict=True
            ):
                if length == 4:
                    assert hashes.setdefault(tuple(prompt[:4]), (found, split)) == (found, split)
    assert len(hashes) > 500


def test_every_symbol_occurs_at_every_place_in_training():
    task = GroupWordsConfig(group="Z2xS3", min_length=5, max_length=5).build()
    tokens_BT = task.batch("train", 0, 2000).tokens_BT
    for place in range(5):
        counts = np.bincount(tokens_BT[:, place], minlength=12)
        assert abs(counts - 2000 / 12).max() < 5 * (2000 / 12) ** 0.5


def test_shares_of_the_splits_are_those_asked_for():
    task = CopyConfig(min_length=8, max_length=8, validation_fraction=0.1, test_fraction=0.3).build()
    hashes = prompt_hashes(task.propose(np.arange(20000, dtype=np.uint64)))
    for split, share in (("train", 0.6), ("validation", 0.1), ("test", 0.3)):
        assert task._within(hashes, split).mean() == pytest.approx(share, abs=0.02)


def test_how_many_problems_are_drawn_together_changes_nothing(monkeypatch):
    task = GroupWordsConfig(group="S3", max_length=9).build()
    together = task.batch("test", 0, 50)
    monkeypatch.setattr("trivium.tasks.drawn.CELLS", 30)
    assert_equal(task.batch("test", 0, 50), together)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_length": 0}, "min_length: expected 1"),
        ({"min_length": 9, "max_length": 8}, "max_length: expected min_length"),
        ({"train_examples": 0}, "train_examples"),
        ({"test_fraction": 0.0}, "test_fraction"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing"),
        ({"group": "S7"}, "known: S2 to S6, A3 to A6, Z2 to Z1024, and products"),
    ],
)
def test_wrong_configs_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        GroupWordsConfig(**changes)
