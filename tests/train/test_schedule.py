import math

import pytest

from trivium.config import UserError
from trivium.train.config import TrainConfig
from trivium.train.schedule import learning_rate, run_length


def rates(config, steps):
    return [learning_rate(config, step, step / steps) for step in range(steps)]


def test_warm_up_reaches_the_peak_and_each_schedule_ends_near_its_floor():
    for schedule, middle in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        config = TrainConfig(learning_rate=1.0, min_learning_rate=0.1, warmup=20, schedule=schedule)
        values = rates(config, 120)
        assert values[0] == pytest.approx(1 / 20)
        assert values[19] == pytest.approx(1.0)
        assert values[20] == pytest.approx(1.0)
        assert values[70] == pytest.approx(0.1 + 0.9 * middle if schedule != "constant" else 1.0)
        assert values[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.02)


def test_without_warm_up_the_first_step_has_the_peak():
    assert rates(TrainConfig(learning_rate=0.5, warmup=0), 10)[0] == 0.5


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    values = rates(TrainConfig(learning_rate=1.0, warmup=100), 10)
    assert values == pytest.approx([(step + 1) / 100 for step in range(10)])


def test_decay_over_tokens_starts_where_warm_up_ends_and_ends_at_the_floor():
    config = TrainConfig(learning_rate=1.0, warmup=10, tokens=1000)
    values = [learning_rate(config, step, step * 10 / 1000) for step in range(100)]
    assert values == pytest.approx(rates(TrainConfig(learning_rate=1.0, warmup=10), 100))


def test_the_length_of_a_run_is_in_steps_epochs_or_tokens():
    assert run_length(TrainConfig(), 10, None).steps == 1000
    assert run_length(TrainConfig(steps=7), 10, None).steps == 7
    assert run_length(TrainConfig(epochs=1.5), 10, 101).steps == math.ceil(151.5 / 10)
    tokens = run_length(TrainConfig(tokens=500), 10, None)
    assert tokens.fraction(3, 250) == 0.5
    assert tokens.fraction(3, 501) == 1.0
    assert tokens.expected_steps(5, 250, 50.0) == 10


def test_epochs_of_a_task_that_never_runs_out_are_refused():
    with pytest.raises(UserError, match=r"train\.epochs: this task's problems never run out"):
        run_length(TrainConfig(epochs=1), 10, None)
