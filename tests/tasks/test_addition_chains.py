"""Chains of thought of sums: true steps, the answer that follows, and controlled damage."""

import numpy as np
import pytest

from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import Step

COLUMN = AdditionConfig(format="column").build()
REVERSED = AdditionConfig(format="reversed_chain").build()


def test_each_step_is_checked_by_its_own_arithmetic():
    example = COLUMN.parse("99+21")
    text = "<think>9+1=11 9+2+1=12 7+7=14 9=9 +1=1 5+5=A</think>120<end>"
    assert COLUMN.steps(example, text) == [
        Step("9+1=11", False),
        Step("9+2+1=12", True),
        Step("7+7=14", True),
        Step("9=9", False),
        Step("+1=1", False),
        Step("5+5=A", False),
    ]


def test_the_step_of_a_reversed_chain_is_read_reversed():
    example = REVERSED.parse("99+21")
    assert REVERSED.steps(example, "<think>99+12=021</think>120<end>") == [Step("99+12=021", True)]
    assert REVERSED.steps(example, "<think>99+21=120</think>120<end>") == [Step("99+21=120", False)]


def test_steps_are_found_in_a_chain_that_was_cut_off_and_nowhere_else():
    assert COLUMN.steps(COLUMN.parse("99+21"), "<think>9+1=10 9+2") == [Step("9+1=10", True), Step("9+2", False)]
    assert COLUMN.steps(COLUMN.parse("3+5"), "8<end>") == []
    plain = AdditionConfig(format="plain").build()
    assert plain.steps(plain.parse("3+5"), "8<end>") == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>9+1=10 9+2+1=12</think>120<end>", "120"),
        ("<think>9+1=10 9+2+1=12</think>999<end>", "120"),
        ("<think>9+1=13 9+2+1=12</think>120<end>", "123"),
        ("<think>2+1=3 1+9=1</think>120<end>", "13"),
        ("<think>2+1=3 0+0=0</think>120<end>", "3"),
        ("<think>2+1= 1+9=1</think>120<end>", None),
        ("<think>9+1=10 9+2+1=12", None),
        ("120<end>", None),
    ],
)
def test_the_answer_that_follows_from_a_column_chain(text, answer):
    assert COLUMN.answer_from_steps(COLUMN.parse("99+21"), text) == answer


def test_the_answer_that_follows_from_a_reversed_chain():
    example = REVERSED.parse("99+21")
    assert REVERSED.answer_from_steps(example, "<think>99+12=021</think>7<end>") == "120"
    assert REVERSED.answer_from_steps(example, "<think>99+12=</think>7<end>") is None


@pytest.mark.parametrize("format", ["column", "reversed_chain"])
@pytest.mark.parametrize("zero_pad", [False, True])
@pytest.mark.parametrize("operands", [2, 13])
def test_the_reference_chain_leads_to_the_reference_answer_and_a_corrupted_one_elsewhere(format, zero_pad, operands):
    config = AdditionConfig(format=format, zero_pad=zero_pad, operands=operands, max_digits=4, min_digits=2)
    task, rng = config.build(), np.random.default_rng(0)
    for example in task.examples("train", np.arange(50)):
        answer = example.answer.partition("</think>")[2].removesuffix("<end>")
        assert task.answer_from_steps(example, example.answer) == answer
        corrupted = task.corrupt_step(example, example.answer, rng)
        assert corrupted is not None
        assert len(corrupted) == len(example.answer)
        assert sum(a != b for a, b in zip(corrupted, example.answer, strict=True)) == 1
        assert corrupted.partition("</think>")[2] == example.answer.partition("</think>")[2]
        assert task.answer_from_steps(example, corrupted) != answer
        assert sum(not step.true for step in task.steps(example, corrupted)) == 1


def test_there_is_nothing_to_corrupt_without_a_chain():
    rng = np.random.default_rng(0)
    assert COLUMN.corrupt_step(COLUMN.parse("3+5"), "8<end>", rng) is None
    assert COLUMN.corrupt_step(COLUMN.parse("99+21"), "<think>no steps</think>120<end>", rng) is None
