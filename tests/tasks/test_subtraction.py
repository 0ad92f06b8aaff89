"""Python subtracts the same."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.subtraction import SubtractionConfig


def test_differences_are_written_as_documented():
    assert SubtractionConfig().build().render(35, 12) == "53-21=32<end>"
    signed = SubtractionConfig(signed=True).build()
    assert signed.render(12, 99) == "21-99=78-<end>"
    assert SubtractionConfig(signed=True, reversed=False).build().render(12, 99) == "12-99=-87<end>"
    assert SubtractionConfig(zero_pad=True, max_length=3).build().render(35, 12) == "530-210=320<end>"


@pytest.mark.parametrize("config", SubtractionConfig.examples())
def test_drawn_differences_are_those_that_python_computes(config):
    task = config.build()
    negative = 0
    for example in task.examples("train", np.arange(60)):
        first, second = task.operands_of(example.prompt)
        text = example.answer.removesuffix("<end>")
        assert task.number_of_text(text.replace("-", "")) == abs(first - second)
        assert ("-" in text) == (first < second)
        negative += first < second
    assert (negative > 0) == config.signed


def test_a_negative_difference_is_refused_where_none_is_written():
    with pytest.raises(UserError, match="negative"):
        SubtractionConfig().build().parse("12-99")
    assert SubtractionConfig(signed=True).build().parse("12-99=").answer == "78-<end>"


def test_only_the_whole_difference_is_right():
    task = SubtractionConfig(signed=True).build()
    example = task.parse("12-99")
    assert task.verify(example, "78-<end>").correct
    for wrong in ("78<end>", "78-", "-78<end>", "87-<end>"):
        assert not task.verify(example, wrong).correct
