"""Generation is timed beside transformers only where both give the same tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from trivium.bench import generate as module
from trivium.bench.gates import WrongResult
from trivium.bench.generate import bench_generate, compare_answers, compare_best
from trivium.bench.train import SHAPES
from trivium.config import UserError

TINY = replace(SHAPES["6.3M"], name="tiny", width=16, ff_width=32, heads=2, layers=1)
CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(module, "PROBLEMS", 12)
    monkeypatch.setattr(module, "CHECKED", {"cpu": 6})


def timed(**options):
    given = {"device": CPU, "dtype": torch.float32, "digits": 2, "repeats": 1, "seconds": 0.2, "shape": TINY}
    return bench_generate((1, 5), **{**given, **options})


@pytest.mark.usefixtures("few")
def test_rows_say_what_each_program_made_of_the_same_prompts():
    found = timed()
    assert [row["batch"] for row in found["rows"]] == [1, 5]
    assert found["gates"]["trivium, float32"] == {"equal": 1.0, "largest_gap": 0.0}
    assert found["gates"]["distinct_answers"] > 1
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["trivium"] / row["transformers"])
        assert 0 < row["trivium_prompts"] <= 12
        assert row["trivium_prompts"] % row["batch"] == 0
    for name, choice in found["operators"].items():
        assert all(choice["backend"] in row["operators"][name] for row in found["rows"]), name
    assert (found["prompt_tokens"], found["new_tokens"]) == (6, 4)


@pytest.mark.usefixtures("few")
def test_nothing_is_timed_where_tokens_differ(monkeypatch):
    right = module.our_answers

    def wrong(*arguments):
        tokens_BN = right(*arguments).copy()
        tokens_BN[2, 0] = (tokens_BN[2, 0] + 1) % 4
        return tokens_BN

    monkeypatch.setattr(module, "our_answers", wrong)
    monkeypatch.setattr(module, "_row", lambda *arguments: pytest.fail("timed all the same"))
    with pytest.raises(WrongResult, match=r"trivium, float32: a token lies .* nothing is timed"):
        timed()


def test_answers_are_compared_up_to_the_end_and_no_further():
    end, wanted_BN = 9, np.array([[1, 2, 9, 0], [3, 3, 3, 9]])
    logits_BNV = np.zeros((2, 4, 10))
    logits_BNV[1, 1, 3], logits_BNV[1, 1, 4] = 5.0, 2.0
    found_BN = np.array([[1, 2, 9, 7], [3, 4, 8, 9]])  # behind an end, and another token at the second place
    found = compare_answers(found_BN, wanted_BN, logits_BNV, end)
    assert found == {"equal": 0.5, "largest_gap": pytest.approx(3.0 / logits_BNV.std())}
    assert compare_answers(wanted_BN, wanted_BN, logits_BNV, end) == {"equal": 1.0, "largest_gap": 0.0}


def test_the_best_of_each_is_compared_at_the_batch_that_suits_it():
    rows = [
        {"batch": 1, "trivium": 3.0, "transformers": 2.0, "transformers_prompts": 5},
        {"batch": 10, "trivium": 60.0, "transformers": 30.0, "transformers_prompts": 20},
        {"batch": 100, "trivium": 50.0, "transformers": 10.0, "transformers_prompts": 100},
    ]
    assert compare_best(rows) == {
        "trivium_batch": 10,
        "one_at_a_time": 30.0,
        "one_at_a_time_prompts": 5,
        "batched": 2.0,
        "batched_prompts": 20,
    }
    assert compare_best(rows[:1])["batched"] is None
    assert compare_best(rows[1:])["one_at_a_time"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats: expected 1 or more, got 0"),
        ({"digits": 0}, "digits: expected 1 or more, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        timed(**options)
    with pytest.raises(UserError, match="at most the 10,000 prompts that there are, got 10001"):
        bench_generate((10_001,), device=CPU, dtype=torch.float32)
    with pytest.raises(UserError, match="batches: expected 1 or more, got 0"):
        bench_generate((), device=CPU, dtype=torch.float32)
