"""Runs that come before a recipe's own, and what a study says of solutions to word problems."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.study.fake_runs import USER_ERROR_SEED, write_run
from trivium.commands.train import train as train_command
from trivium.config import UserError, config_hash, from_dict, results_only, to_yaml
from trivium.report.folder import read_result
from trivium.report.tables import pretraining_table, solution_tables
from trivium.report.words import describe_study
from trivium.study.compare import compare
from trivium.study.jobs import Job, Plan, Workers
from trivium.study.recipe import Recipe, load_recipe
from trivium.study.results import Entry, collect
from trivium.study.variants import expand
from trivium.train.config import RunConfig
from trivium.train.run import read_config

FAKE = "tests.study.fake_runs:train"
ROOT = Path(__file__).parents[2]


def plain(seeds=(0, 1), pretraining_seed=7, **task):
    return {
        "name": "study",
        "pretrain": {
            "task": {"kind": "addition", "format": "reversed", "max_digits": 1, **task},
            "train": {"steps": 3, "batch": 8, "eval_every": 3, "eval_examples": 8, "seed": pretraining_seed},
            "evaluate": {"examples": 10},
        },
        "task": {"kind": "addition", "format": "reversed", "max_digits": 2},
        "model": {"width": 16, "heads": 2, "positions": "block", "max_length": 24},
        "train": {"steps": 2, "batch": 8, "eval_every": 2, "eval_examples": 8, "device": "cpu", "threads": 1},
        "evaluate": {"examples": 10, "samples": 2},
        "compare": {
            "seeds": list(seeds),
            "learning_rates": [1e-3, 3e-3],
            "tuning_examples": 3,
            "variants": {
                "attention": {"model.layers": "attention*2"},
                "local": {"model.layers": "attention*1 + attention(window=2)*1"},
            },
        },
    }


def test_every_run_of_a_variant_begins_with_the_weights_of_its_one_pretraining(warm_workers, tmp_path):
    recipe = from_dict(Recipe, plain())
    results = compare(recipe, tmp_path, jobs=1, target=FAKE)
    folder = tmp_path / recipe.folder_name
    assert results["status"] == "finished"
    for name, variant in results["variants"].items():
        (first,) = folder.glob(f"{name}-pretraining-*")
        config = read_config(first)
        assert (config.task, config.train.seed, config.train.steps) == (recipe.pretrain.task, 7, 3)
        assert config.model == read_config(next(folder.glob(f"{name}-s0-*"))).model
        runs = [path for path in folder.glob(f"{name}-s*-*") if path != first]
        assert len(runs) == 4  # two seeds, two rates of the grid
        assert {read_config(run).train.init_from for run in runs} == {first}
        scored = {(read_config(run).train.seed, read_config(run).evaluate.examples) for run in runs}
        assert scored == {(0, 10), (1, 10), (1000, 3)}
        assert variant["pretraining"]["run"] == first.name
    table = pretraining_table(results)
    assert [row[0] for row in table.rows] == ["attention", "local"]
    assert "Pretraining" in (folder / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    again = compare(recipe, tmp_path, jobs=1, target=FAKE)
    assert again["variants"] == results["variants"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}


def test_a_variant_whose_pretraining_fails_is_listed_and_not_trained(warm_workers, tmp_path):
    recipe = from_dict(Recipe, plain(pretraining_seed=USER_ERROR_SEED))
    results = compare(recipe, tmp_path, jobs=1, target=FAKE)
    assert (results["status"], results["not_run"]) == ("failed", ["attention", "local"])
    assert [each["error"] for each in results["failed"]] == ["train.batch: that will not do"] * 2
    assert not list((tmp_path / recipe.folder_name).glob("*-s0-*"))


def test_a_pretraining_of_another_vocabulary_is_refused_before_the_first_run(tmp_path):
    recipe = from_dict(Recipe, plain(base=16))
    with pytest.raises(UserError, match=r"attention: pretrain.task: its vocabulary of \d+ symbols is not that of task"):
        compare(recipe, tmp_path / "runs", target=FAKE)
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_with_a_pretraining_alone_is_said_to_be_its_own(tmp_path):
    data = plain(max_digits=9)
    with pytest.raises(UserError, match=r"^pretrain: model.max_length: 24 is shorter"):
        compare(from_dict(Recipe, data), tmp_path / "runs", target=FAKE)
    (tmp_path / "recipe.yaml").write_text(to_yaml({key: data[key] for key in data if key not in ("compare", "name")}))
    with pytest.raises(UserError, match=r"^pretrain: model.max_length: 24 is shorter"):
        train_command([str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_weights_whose_sizes_the_two_tasks_do_not_share_are_refused_before_the_first_run(tmp_path):
    data = plain()
    data["model"] = {"width": 16, "heads": 2, "positions": "learned"}
    with pytest.raises(UserError, match=r"max_length: .* pretrain's problems are of \d+ .* allowed: \d+ or more"):
        compare(from_dict(Recipe, data), tmp_path / "runs", target=FAKE)
    (tmp_path / "recipe.yaml").write_text(to_yaml({key: data[key] for key in data if key not in ("compare", "name")}))
    with pytest.raises(UserError, match=r"^model.max_length: "):
        train_command([str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
    data["model"]["positions"] = "rotary"  # has no weights
    assert all(variant.pretraining for variant in expand(from_dict(Recipe, data)))


def test_weights_to_begin_with_beside_a_pretraining_are_refused():
    data = plain()
    data["train"]["init_from"] = "somewhere"
    with pytest.raises(UserError, match=r"train.init_from: given beside pretrain"):
        from_dict(Recipe, data)


def test_fewer_runs_go_side_by_side_than_there_are_workers_for(warm_workers, tmp_path):
    jobs = [
        Job(from_dict(RunConfig, {"train": {"seed": seed, "steps": 10}}), tmp_path / f"run-s{seed}")
        for seed in range(3)
    ]
    with Workers(Plan(jobs=2, threads=1), tmp_path / "workers.log", target=FAKE) as workers:
        assert set(workers.run(jobs, lambda event: None, side_by_side=1).values()) == {None}
    assert len({(job.folder / "calls.log").read_text().split()[0] for job in jobs}) == 1


def test_a_recipe_without_pretraining_keeps_the_name_that_it_had():
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert "pretrain" not in results_only(recipe)
    assert config_hash(recipe) == "0a9a58d7"
    assert "pretrain" in results_only(from_dict(Recipe, plain()))


def test_a_run_keeps_its_name_however_the_folder_of_its_pretraining_is_spelled(warm_workers, tmp_path, monkeypatch):
    recipe = from_dict(Recipe, plain(seeds=(0,)))
    monkeypatch.chdir(tmp_path)
    first = compare(recipe, "runs", jobs=1, target=FAKE)
    trained: list[str] = []
    for place in (tmp_path / "runs", Path("..", tmp_path.name, "runs")):
        again = compare(recipe, place, jobs=1, target=FAKE, on_progress=lambda event: trained.append(event.kind))
        assert again["variants"] == first["variants"]
    assert set(trained) == {"kept"}

    def named(folder):
        return config_hash(from_dict(RunConfig, {"train": {"init_from": folder}}))

    assert named("runs/study/a-pretraining-s0-0123abcd") == named("/else/where/study/a-pretraining-s0-0123abcd")
    assert len({named(f"runs/{n}") for n in ("study/a-pretraining-s0-0123abcd", "study/a", "x/study/a")}) == 3


def test_trivium_train_trains_what_comes_before_and_goes_on_from_it(tmp_path, capsys):
    data = plain()
    data["train"] |= {"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}  # as good as no training
    (tmp_path / "recipe.yaml").write_text(to_yaml({key: data[key] for key in data if key not in ("compare", "name")}))
    assert train_command([str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")]) == 0
    (first,), (own,) = (list((tmp_path / "runs").glob(f"*/{name}-s*")) for name in ("own-pretraining", "own"))
    theirs, ours = (load_file(folder / "model" / "model.safetensors") for folder in (first, own))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-8, rtol=0)
    assert read_result(first)["step"] == 3
    assert read_result(own)["peak_bytes"] is None  # counted on a GPU
    assert str(own) in capsys.readouterr().out


def solved(folder: Path, config: RunConfig, right: list[bool], loss: float) -> None:
    """Write a finished run of word problems that was right on some of them."""
    write_run(folder, config)
    result = json.loads((folder / "result.json").read_text())
    share = {"rate": sum(right) / len(right), "successes": sum(right), "n": len(right), "low": 0.0, "high": 1.0}
    result["evaluation"] |= {
        "readings": {"strict": {**share, "unread": 0}, "flexible": {**share, "unread": 0}},
        "constant": {"answer": "#### 4", **share, "rate": 0.25},
        "loss": loss,
        "answer_loss": 2 * loss,
        "chain": {"steps_true": {**share, "n": 0}, "steps_wanted": share},
    }
    (folder / "result.json").write_text(json.dumps(result))
    rows = [
        {"prompt": f"p{n}", "correct": each, "readings": {"strict": each, "flexible": each}}
        for n, each in enumerate(right)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_of_answers_has_the_rules_of_the_task():
    share = {"mean": 0.5, "low": 0.4, "high": 0.6, "values": [0.4, 0.6]}
    scores = {"normalised": share, "math_verify": share}
    tests = {"0": {"exact_match": {"p": 1.0}, "normalised": {"p": 0.25}, "math_verify": {"p": 0.5}}}
    variants = {
        name: {"solutions": scores, "paired": paired, "seeds": {}} for name, paired in (("one", {}), ("two", tests))
    }
    by_rule, _ = solution_tables({"variants": variants, "baseline": "one"})
    assert by_rule.columns == ["variant", "normalised", "math_verify", "p"]
    assert [row[-1] for row in by_rule.rows] == ["\u2013", "0.25"]
    assert "McNemar's test of normalised against one" in by_rule.note


def test_solutions_are_averaged_over_seeds_and_answers_compared_problem_by_problem(tmp_path, caplog):
    data = plain()
    del data["pretrain"]
    recipe = from_dict(Recipe, data)
    entries = [Entry(variant, 1e-3) for variant in expand(recipe)]
    answers = {"attention": [True, False, False, False], "local": [True, True, False, True]}
    for entry in entries:
        for seed in (0, 1):
            entry.folders[seed] = tmp_path / f"{entry.variant.name}-s{seed}"
            loss = 2.0 - (0.5 if entry.variant.name == "local" else 0) - 0.1 * seed
            solved(entry.folders[seed], entry.variant.run(seed), answers[entry.variant.name], loss)
    (entries[1].folders[1] / "answers.jsonl").unlink()
    found = collect(recipe, entries, length=20)["variants"]
    assert found["local"]["solutions"]["strict"]["mean"] == 0.75
    assert found["local"]["solutions"]["loss"]["difference"]["values"] == pytest.approx([-0.5, -0.5])
    assert "steps_true" not in found["local"]["solutions"]  # no step was written
    assert found["attention"]["paired"] == {}
    assert list(found["local"]["paired"]) == ["0"]  # of seed 1 one run kept no answers
    test = found["local"]["paired"]["0"]["strict"]
    assert (test["first_only"], test["second_only"], test["p"]) == (2, 0, 0.5)
    (entries[1].folders[1] / "answers.jsonl").write_text('{"prompt": "p0", "corr')
    with caplog.at_level("WARNING", logger="trivium"):
        broken = collect(recipe, entries, length=20)["variants"]
    assert broken["local"]["paired"]["0"] == found["local"]["paired"]["0"]
    assert broken["local"]["paired"]["1"]["error"].startswith(f"{entries[1].folders[1] / 'answers.jsonl'}:1: not a row")
    assert "no paired test" in caplog.text
    note = solution_tables({"variants": broken, "baseline": "attention"})[0].note
    assert "No test of local, seed 1: " in note
    solved(entries[1].folders[1], entries[1].variant.run(1), [True], 1.4)
    error = collect(recipe, entries, length=20)["variants"]["local"]["paired"]["1"]["error"]
    assert error.endswith("4 answers, of 1 problems here; score both on the same ones")
    assert str(entries[1].folders[1]) in error
    by_rule, likelihood = solution_tables({"variants": found, "baseline": "attention"})
    assert [row[0] for row in by_rule.rows] == ["attention", "local"]
    assert by_rule.rows[1][-1] == "0.5"
    assert "Always '#### 4': 25.00 %" in by_rule.note
    assert likelihood.rows[0][1].startswith("1.9500 ±")
    results = {"variants": found, "baseline": "attention", "thresholds": [], "failed": [], "status": "finished"}
    results["matched"] = {"by": "parameters", "to": "attention"}
    words = describe_study(results)
    assert not any("in tokens" in text for text in words)  # there is no threshold to reach
    assert any("cost attention 1.9500 nats a token" in text and "local -0.5000 (-0.5000" in text for text in words)
    found["local"]["changes"]["train.chain_loss"] = False  # of answers alone: another loss
    assert not any("nats a token" in text for text in describe_study(results))
    found["local"]["changes"].clear()
    for variant in found.values():
        del variant["solutions"]["loss"]  # as runs had none before it was kept
    assert not any("nats a token" in text for text in describe_study(results))
