"""reasoning-gym's generators: strict equality, splits that share nothing, and what is not there is said."""

import importlib.util
import sys

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.gym import GymConfig, parse_options

installed = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the extra 'gym' is not installed"
)
SHORT = "min_terms=2, max_terms=3, max_digits=2"


@pytest.fixture(scope="module")
def sums():
    return GymConfig(options=SHORT).build()


@installed
def test_the_answer_is_the_generators(sums):
    for example in sums.examples("train", np.arange(20)):
        expression = example.prompt.partition(": ")[2].removesuffix(" =<answer>")
        assert example.answer == f"{eval(expression)}<end>"  # of numbers, + and -


@installed
def test_an_answer_that_contains_the_right_one_is_wrong(sums):
    example = sums.example("test", 0)
    right = example.answer.removesuffix("<end>")
    assert sums.verify(example, example.answer).correct
    for wrong in (right, f"{right}0<end>", f" {right}<end>", f"It is {right}<end>", f"{right}.0<end>", "<end>"):
        assert not sums.verify(example, wrong).correct


@installed
def test_another_seed_draws_from_the_same_splits(sums):
    other = GymConfig(options=SHORT, seed=1).build()
    train = {example.prompt for example in sums.examples("train", np.arange(300))}
    held_out = {example.prompt for split in ("validation", "test") for example in other.examples(split, np.arange(40))}
    assert not train & held_out


def test_options_are_values_as_in_a_recipe():
    assert parse_options("") == {}
    assert parse_options("a=1, b=[2, 3], c=true, d=x") == {"a": 1, "b": [2, 3], "c": True, "d": "x"}
    for wrong in ("a", "a=1, a=2", "1=2", "a=[1"):
        with pytest.raises(UserError, match="options"):
            parse_options(wrong)


@installed
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "sums"}, "has no 'sums'; it has .*chain_sum"),
        ({"options": "terms=3"}, "does not take"),
        ({"options": "min_terms=0"}, "min_terms must be positive"),
        ({"options": "seed=3"}, "seed is not an option"),
        ({"dataset": "graph_color"}, "no single answer"),
        ({"max_tokens": 20}, "see max_tokens"),
        ({"max_tokens": 0}, "max_tokens: expected 1 or more"),
        ({"test_fraction": 0.0}, "test_fraction"),
    ],
)
def test_what_cannot_be_drawn_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        GymConfig(**given).build()


def test_without_the_extra_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'trivium\[gym\]'"):
        GymConfig().build()
