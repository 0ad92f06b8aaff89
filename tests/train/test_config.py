import pytest

from trivium.config import UserError
from trivium.train.config import TrainConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "epochs": 1.0}, "epochs: given beside steps"),
        ({"epochs": 1.0, "tokens": 9}, "tokens: given beside epochs"),
        ({"batch": 4, "batch_tokens": 99}, "batch_tokens: given beside batch"),
        ({"steps": 0}, "steps: expected a number above 0"),
        ({"batch": -1}, "batch: expected a number above 0"),
        ({"micro_batch": 0}, "micro_batch: expected"),
        ({"learning_rate": float("nan")}, "learning_rate: expected"),
        ({"learning_rate": 1e-3, "min_learning_rate": 1e-2}, "is above learning_rate"),
        ({"warmup": -1}, "warmup: expected 0 or more"),
        ({"beta2": 1.0}, "beta2: expected at least 0 and less than 1"),
        ({"keep": 0}, "keep: expected"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
    ],
)
def test_an_impossible_value_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


def test_a_batch_given_in_tokens_holds_as_many_of_the_longest_examples_as_fit():
    assert TrainConfig(batch_tokens=100).batch_examples(longest=13) == 7
    assert TrainConfig().batch_examples(longest=13) == 256
    with pytest.raises(UserError, match="less than the 13 tokens of one example"):
        TrainConfig(batch_tokens=12).batch_examples(longest=13)
