"""What a person sees of a problem."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.data.show import show_examples, show_expression
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.group_words import GroupWordsConfig
from trivium.tasks.recall import RecallConfig

TASK = AdditionConfig(format="column").build()


def test_an_expression_is_shown_token_by_token():
    shown = show_expression(TASK, "99+21")
    assert shown.text == "99+21=<think>9+1=10 9+2+1=12</think>120<end>"
    assert "".join(token.text for token in shown.tokens) == shown.text
    assert [token.position for token in shown.tokens[:7]] == [1, 2, 0, 1, 2, 0, 0]
    assert [token.region for token in shown.tokens[5:8]] == ["prompt", "chain", "chain"]
    assert [token.scored for token in shown.tokens] == [False] * 6 + [True] * (len(shown.tokens) - 6)
    assert [token.digit for token in shown.tokens[:3]] == [True, True, False]
    assert shown.example.tags == {"digits": 2, "carries": 2, "longest_carry_chain": 2}


def test_a_masked_chain_is_shown_as_not_scored():
    tokens = show_expression(TASK, "99+21", chain_loss=False).tokens
    assert "".join(token.text for token in tokens if token.scored) == "120<end>"


def test_places_can_be_shown_in_place_of_digit_runs():
    tokens = show_expression(TASK, "99+21", positions="token").tokens
    assert [token.position for token in tokens] == list(range(len(tokens)))


def test_a_half_expression_is_shown_as_far_as_it_goes():
    shown = show_expression(TASK, "7+")
    assert [(token.text, token.scored) for token in shown.tokens] == [("7", False), ("+", False)]


def test_examples_are_those_that_training_sees():
    shown = show_examples(TASK, "train", 5)
    assert [one.example for one in shown] == TASK.examples("train", np.arange(5))
    assert len(show_examples(AdditionConfig(train_examples=3).build(), "train", 5)) == 3
    batch = TASK.batch("train", 0, 5)
    for b, one in enumerate(shown):
        scored = [token.scored for token in one.tokens][1:]
        assert scored == (batch.weights_BT[b, : batch.lengths_B[b]] > 0).tolist()


def test_no_examples_are_refused():
    with pytest.raises(UserError, match="count"):
        show_examples(TASK, "train", 0)


def test_labels_are_shown_at_the_tokens_that_they_are_of():
    shown = show_expression(GroupWordsConfig(group="Z2").build(), "1101")
    assert [(token.text, token.target, token.scored) for token in shown.tokens] == [
        ("1", "1", True),
        ("1", "0", True),
        ("0", "0", True),
        ("1", "1", True),
    ]
    assert shown.text == "1101 1001<end>"
    recall = RecallConfig(vocabulary=16, pairs=1, min_length=3, max_length=9).build()
    tokens = show_expression(recall, "k1v2v3k1").tokens
    assert [(token.target, token.scored) for token in tokens] == [("", False)] * 3 + [("v2", True)]
    assert {token.region for token in tokens} == {"prompt"}
    assert all(token.target is None for token in show_expression(TASK, "99+21").tokens)
