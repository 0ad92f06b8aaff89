import json
import math

import pytest

from tests.study.fake_runs import write_run
from trivium.config import from_dict
from trivium.study.recipe import Recipe
from trivium.study.results import Entry, collect, difference, interval, token_ratio, tokens_to
from trivium.study.variants import expand


def test_tokens_to_a_threshold_are_read_between_evaluations():
    tokens, rates = [100, 200, 300, 400], [0.2, 0.4, 0.9, 1.0]
    assert tokens_to(tokens, rates, 0.5) == pytest.approx(220)
    assert tokens_to(tokens, rates, 0.9) == pytest.approx(300)
    assert tokens_to(tokens, rates, 0.95) == pytest.approx(350)


def test_a_threshold_met_at_once_counts_the_first_evaluation():
    assert tokens_to([100, 200], [0.95, 1.0], 0.9) == 100


def test_a_threshold_never_met_has_no_tokens():
    assert tokens_to([100, 200], [0.1, 0.89], 0.9) is None
    assert tokens_to([], [], 0.9) is None


def test_the_first_crossing_counts_when_a_run_falls_back():
    assert tokens_to([100, 200, 300, 400], [0.0, 1.0, 0.0, 1.0], 0.5) == pytest.approx(150)


def test_evaluations_without_a_rate_are_passed_over():
    assert tokens_to([100, 200, 300], [0.0, None, 1.0], 0.5) == pytest.approx(200)


def test_intervals_over_seeds_are_students():
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == pytest.approx(2)
    # t for 2 degrees of freedom at 95 % is 4.30265, the standard error 1 / sqrt(3).
    assert found["high"] - found["mean"] == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert interval([0.5])["low"] is None
    assert interval([])["mean"] is None


def seed(rate, tokens=None, status="finished"):
    found = {"status": status, "tokens_to": {"0.9": tokens}}
    return {**found, "exact_match": {"rate": rate}} if status == "finished" else found


def test_differences_are_paired_by_seed_and_leave_out_what_did_not_finish():
    mine = {"0": seed(0.9), "1": seed(0.8), "2": seed(None, status="failed")}
    baseline = {"0": seed(0.5), "1": seed(0.6), "2": seed(0.1)}
    found = difference(mine, baseline)
    assert found["values"] == pytest.approx([0.4, 0.2])
    assert found["mean"] == pytest.approx(0.3)
    # t for 1 degree of freedom is 12.7062, the standard error 0.1.
    assert found["low"] == pytest.approx(0.3 - 1.27062, rel=1e-5)


def test_token_ratios_are_geometric_means_and_say_when_seeds_are_missing():
    baseline = {"0": seed(1, 100), "1": seed(1, 100)}
    found = token_ratio({"0": seed(1, 50), "1": seed(1, 200)}, baseline, "0.9")
    assert found["mean"] == pytest.approx(1)
    assert found["low"] * found["high"] == pytest.approx(1)
    assert found["all"]
    partial = token_ratio({"0": seed(1, 50), "1": seed(1)}, baseline, "0.9")
    assert partial["values"] == pytest.approx([0.5])
    assert not partial["all"]


@pytest.fixture
def entries(tmp_path):
    recipe = from_dict(
        Recipe,
        {
            "task": {"kind": "addition", "max_digits": 2},
            "model": {"width": 16, "heads": 2},
            "compare": {
                "seeds": [0, 1],
                "variants": {"attention": {}, "local": {"model.layers": "attention*1 + attention(window=2)*1"}},
            },
        },
    )
    entries = [Entry(variant, 3e-3) for variant in expand(recipe)]
    for number, entry in enumerate(entries):
        for which in (0, 1):
            run = entry.variant.run(which)
            entry.folders[which] = tmp_path / entry.variant.folder_name(run)
            write_run(entry.folders[which], run, speed=1.0 + number)
    return recipe, entries


def test_results_hold_sizes_curves_scores_and_the_difference_to_the_baseline(entries):
    recipe, entries = entries
    results = collect(recipe, entries, length=9)
    local, attention = results["variants"]["local"], results["variants"]["attention"]
    assert results["baseline"] == "attention"
    assert local["relative"]["parameters"] == pytest.approx(1, abs=0.01)
    assert local["sizes"]["state_bytes_per_token"] * local["sizes"]["length"] == local["sizes"]["state_bytes"]
    curve = local["seeds"]["1"]["curve"]
    assert len(curve["tokens"]) == len(curve["exact_match"]) == len(curve["loss"]) == 12
    assert local["exact_match"]["values"] == [seed["exact_match"]["rate"] for seed in local["seeds"].values()]
    assert local["tokens_to"]["0.9"]["mean"] < attention["tokens_to"]["0.9"]["mean"]
    assert local["token_ratio"]["0.9"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert "difference" not in attention
    assert local["tokens_per_second"] == 150_500
    assert local["by_tag"]["digits"]["2"]["n"] == 200
    assert results["failed"] == []


def test_a_run_that_failed_is_listed_and_left_out_of_the_means(entries):
    recipe, entries = entries
    (entries[1].folders[0] / "result.json").unlink()
    entries[1].errors[0] = "it broke"
    results = collect(recipe, entries, length=9)
    local = results["variants"]["local"]
    assert [failure["run"] for failure in results["failed"]] == [entries[1].folders[0].name]
    assert local["seeds"]["0"]["status"] == "failed"
    assert len(local["exact_match"]["values"]) == 1
    assert local["exact_match"]["low"] is None
    assert (local["tokens_to"]["0.9"]["reached"], local["tokens_to"]["0.9"]["seeds"]) == (1, 2)


def test_a_run_that_goes_on_counts_neither_for_a_threshold_nor_against_it(entries):
    recipe, entries = entries
    (entries[1].folders[0] / "result.json").unlink()
    local = collect(recipe, entries, length=9)["variants"]["local"]
    assert local["seeds"]["0"]["status"] == "unfinished"
    assert (local["tokens_to"]["0.9"]["reached"], local["tokens_to"]["0.9"]["seeds"]) == (1, 1)
    assert not local["token_ratio"]["0.9"]["all"]


def test_the_last_line_of_metrics_may_be_cut_off(entries):
    recipe, entries = entries
    with (entries[0].folders[0] / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 601, "spl')
    assert len(collect(recipe, entries, length=9)["variants"]["attention"]["seeds"]["0"]["curve"]["step"]) == 12


def test_a_curve_says_how_much_of_its_chains_a_run_lacked(entries):
    recipe, entries = entries
    assert "chain_removed" not in collect(recipe, entries, length=9)["variants"]["attention"]["seeds"]["0"]["curve"]
    path = entries[0].folders[0] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [{**row, "chain_removed": row["step"] // 10} if row["split"] == "validation" else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    curve = collect(recipe, entries, length=9)["variants"]["attention"]["seeds"]["0"]["curve"]
    assert curve["chain_removed"] == [step // 10 for step in curve["step"]]
    assert curve["chain_removed"][-1] > 0


def test_scores_by_length_are_means_over_the_seeds_that_were_read_at_it(entries):
    recipe, entries = entries
    for rate, folder in zip((0.2, 0.4), entries[0].folders.values(), strict=True):
        path = folder / "result.json"
        result = json.loads(path.read_text())
        score = {"rate": rate, "low": 0.0, "high": 1.0, "successes": 1, "n": 5}
        lengths = {"18": {"exact_match": score, "token_error": {**score, "rate": 1 - rate}}}
        if rate == 0.2:
            lengths["34"] = lengths["18"]
        result["evaluation"]["by_length"] = lengths
        path.write_text(json.dumps(result))
    variants = collect(recipe, entries, length=9)["variants"]
    found = variants["attention"]["by_length"]
    assert list(found) == ["18"]
    assert found["18"]["exact_match"]["mean"] == pytest.approx(0.3)
    assert found["18"]["token_error"]["values"] == pytest.approx([0.8, 0.6])
    assert variants["local"]["by_length"] == {}
