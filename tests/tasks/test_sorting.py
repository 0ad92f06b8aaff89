"""Python sorts the same."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.sorting import SortingConfig
from trivium.tasks.subtraction import SubtractionConfig


@pytest.mark.parametrize("config", SortingConfig.examples())
def test_the_answer_is_what_python_sorts(config):
    task = config.build()
    for example in task.examples("train", np.arange(60)):
        numbers = [int(number) for number in example.prompt.removesuffix("=").split(",")]
        ordered = sorted(numbers, reverse=config.descending)
        assert example.answer == ",".join(map(str, ordered)) + "<end>"
        assert example.tags == {"length": len(numbers), "repeated": "yes" if len({*numbers}) < len(numbers) else "no"}
        assert config.min_length <= len(numbers) <= config.max_length


def test_orders_of_the_same_numbers_lie_in_one_split():
    task = SortingConfig(min_length=2, max_length=3, max_digits=1).build()
    train, test = (
        {task.canonical(example) for example in task.examples(split, np.arange(600))} for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test


def test_lists_can_be_typed():
    task = SortingConfig(descending=True).build()
    assert task.parse("3, 17, 3 =").answer == "17,3,3<end>"
    for wrong in ("", "3,,4", "3;4", "a,b", "3,4=4,3", "-3,4"):
        with pytest.raises(UserError, match="expected numbers"):
            task.parse(wrong)


@pytest.mark.parametrize("changes", [{"max_digits": 0}, {"max_digits": 16}, {"min_length": 0}])
def test_wrong_configs_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        SortingConfig(**changes)


@pytest.mark.parametrize(
    "task", [SortingConfig(max_length=3, max_digits=1), SubtractionConfig(max_length=2, zero_pad=True)]
)
def test_a_task_is_as_long_as_its_longest_problem(task):
    made = task.build()
    assert made.batch("train", 0, 200).lengths_B.max() + 1 == made.max_length
