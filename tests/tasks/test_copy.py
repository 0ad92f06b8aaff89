"""The answer is the string."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.copy import CopyConfig


@pytest.mark.parametrize("backwards", [False, True])
def test_the_answer_is_the_string(backwards):
    task = CopyConfig(max_length=8, backwards=backwards).build()
    for example in task.examples("train", np.arange(30)):
        string = example.prompt.removesuffix("=")
        assert example.answer == (string[::-1] if backwards else string) + "<end>"
        assert example.tags == {"length": len(string)}


def test_many_symbols_are_numbered():
    task = CopyConfig(vocabulary=30).build()
    assert task.parse("<29> <3> =").answer == "<29><3><end>"
    with pytest.raises(UserError, match="vocabulary"):
        CopyConfig(vocabulary=1)


@pytest.mark.parametrize("wrong", ["", "=", "ab", "a=b=", "ab=c"])
def test_what_is_no_string_is_refused(wrong):
    with pytest.raises(UserError, match="expected a string and ="):
        CopyConfig().build().parse(wrong)
