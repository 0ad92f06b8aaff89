"""`trivium bench generate`: both programs give the same tokens before anything is timed, and what the best row says."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from trivium.bench import generate as bench
from trivium.bench.gates import WrongResult
from trivium.bench.train import Shape
from trivium.config import UserError
from trivium.tasks.addition import AdditionConfig

TINY = Shape("tiny", 16, 2, 2, 32, 8, AdditionConfig(max_digits=2, zero_pad=True), 12)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "PROBLEMS", 24)


def run(**options):
    given = {"device": CPU, "dtype": torch.float32, "digits": 2, "repeats": 1, "seconds": 0.05, "shape": TINY}
    return bench.bench_generate(**{"batches": (1, 12), **given, **options})


def test_rows_tell_rates_prompts_and_what_was_checked():
    results = run()
    assert [row["batch"] for row in results["rows"]] == [1, 12]
    for row in results["rows"]:
        assert row["trivium"] > 0 < row["transformers"]
        assert row["trivium_prompts"] % row["batch"] == 0 < row["transformers_prompts"] <= 24
    assert results["gates"]["trivium, float32"]["largest_gap"] < 1e-3
    assert results["gates"]["distinct_answers"] > 1
    json.dumps(results)


def test_a_program_that_answers_otherwise_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    plain = bench.our_answers
    monkeypatch.setattr(bench, "our_answers", lambda *given: (plain(*given) + 1) % 3)
    with pytest.raises(WrongResult, match="nothing is timed"):
        run()


def test_the_best_of_each_is_compared_at_the_batch_that_suits_it():
    rows = [
        {"batch": 1, "trivium": 3.0, "transformers": 2.0, "transformers_prompts": 5},
        {"batch": 10, "trivium": 60.0, "transformers": 30.0, "transformers_prompts": 20},
        {"batch": 100, "trivium": 50.0, "transformers": 10.0, "transformers_prompts": 100},
    ]
    assert bench.compare_best(rows) == {
        "trivium_batch": 10,
        "one_at_a_time": 30.0,
        "one_at_a_time_prompts": 5,
        "batched": 2.0,
        "batched_prompts": 20,
    }
    assert bench.compare_best(rows[:1])["batched"] is None
    assert bench.compare_best(rows[1:])["one_at_a_time"] is None


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (25,)}, {"repeats": 0}, {"digits": 0}])
def test_sizes_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        run(**wrong)
