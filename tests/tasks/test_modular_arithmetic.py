"""Python computes the same."""

import re

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.modular_arithmetic import ModularArithmeticConfig


@pytest.mark.parametrize("brackets", [False, True])
@pytest.mark.parametrize("modulus", [2, 7, 13])
def test_values_are_those_that_python_computes(brackets, modulus):
    task = ModularArithmeticConfig(max_length=9, modulus=modulus, brackets=brackets).build()
    batch = task.batch("train", 0, 120)
    for b, example in enumerate(task.examples("train", np.arange(120))):
        expression = re.sub("[<>]", "", example.prompt.removesuffix("="))
        value = eval(expression) % modulus  # of digits, operators and brackets
        assert batch.targets_BT[b, batch.lengths_B[b] - 2] == value
        assert re.sub("[<>]|end", "", example.answer) == str(value)
        assert ("(" in expression) == (brackets and example.tags["length"] > 2)


def test_every_operation_but_the_last_is_bracketed_and_any_order_occurs():
    task = ModularArithmeticConfig(min_length=4, max_length=4, brackets=True, operators="+").build()
    shapes = {re.sub(r"\d", "n", example.prompt) for example in task.examples("train", np.arange(300))}
    assert shapes == {
        "((n+n)+n)+n=",
        "(n+(n+n))+n=",
        "(n+n)+(n+n)=",
        "n+((n+n)+n)=",
        "n+(n+(n+n))=",
    }


def test_only_the_operators_asked_for_occur():
    task = ModularArithmeticConfig(operators="-*", max_length=8).build()
    text = "".join(example.prompt for example in task.examples("train", np.arange(50)))
    assert set(text) == set("01234-*=")


def test_an_expression_can_be_typed_with_brackets_or_without():
    task = ModularArithmeticConfig(modulus=7).build()
    assert task.parse("3 + 4 * 2 =").answer == "4<end>"
    assert task.parse("((3+4))*2=").answer == "0<end>"
    for wrong in ("3+4", "3+=", "(3+4=", "3 4=", "=", "", "3+4=0", ")3="):
        with pytest.raises(UserError, match="expected an expression"):
            task.parse(wrong)


@pytest.mark.parametrize("changes", [{"modulus": 1}, {"operators": ""}, {"operators": "++"}, {"operators": "/"}])
def test_wrong_configs_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        ModularArithmeticConfig(**changes)
