"""The commands as people meet them: what works says what it did."""

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.commands.line import RECIPE, assert_refused, run
from trivium.commands.eval import show as show_scores
from trivium.config import config_hash, from_dict
from trivium.train.config import RunConfig


def test_train_help_shows_each_field_with_its_docstring_and_the_value_of_the_recipe(capsys, recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # wider screens get several columns
    status, out, _ = run(capsys, "train", recipe, "--help")
    assert status == 0
    words = " ".join(out.split())
    assert "--train.batch INT|null Examples a step, over all devices together" in words
    assert "--train.steps INT|null Length in optimizer steps" in words
    assert "(default: 3)" in words
    assert "--task.max-digits INT" in words
    assert "--model.layers TEXT" in words
    assert "attention*1" in words
    assert "--compare.seeds [INT ...]" in words


def test_every_value_of_a_recipe_can_be_given_as_a_flag(capsys, recipe, tmp_path):
    status, out, err = run(
        capsys, "train", recipe, "--runs", tmp_path, "--train.steps", 2, "--model.layers", "attention(window=4)*2",
        "--train.learning_rate=1e-3", "--task.max-digits", "3", "--evaluate.examples", "4", "--train.warmup", "0",
    )  # fmt: skip
    assert status == 0, err
    assert "after 2 steps" in out
    assert "attention(window=4)*2" in Path(out.split("report: ")[1].split()[0]).read_text()
    (config,) = tmp_path.glob("tiny-*/own-s0-*/config.yaml")
    text = config.read_text()
    for line in ("layers: attention(window=4)*2", "learning_rate: 0.001", "max_digits: 3", "steps: 2", "warmup: 0"):
        assert line in text


def test_a_mapping_in_a_recipe_is_one_flag_too(capsys, recipe, tmp_path):
    path = tmp_path / "named.yaml"
    path.write_text(RECIPE.replace("positions: block", "positions: block, backends: {attention: reference}"))
    for arguments, backend in (
        ([path], "reference"),
        ([path, "--model.backends", "{attention: torch}"], "torch"),
        ([recipe, "--model.backends", '{"attention": "reference"}'], "reference"),
    ):
        status, out, err = run(capsys, "train", *arguments, "--runs", tmp_path / "runs")
        assert status == 0, err
        record = json.loads((Path(out.split("run folder: ")[1].split("\n")[0]) / "environment.json").read_text())
        assert record["operators"]["attention"] == {"backend": backend, "reason": "asked for by name"}
    status, _, err = run(capsys, "train", recipe, "--model.backends", "{attention: magic}")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "backends.attention: 'magic' is not allowed" in err


def test_a_flag_with_a_list_takes_words_or_yaml(recipe):
    from trivium.commands.compare import CompareOptions
    from trivium.commands.recipes import read_recipe

    for words in (["1", "2"], ["[1, 2]"]):
        _, given = read_recipe(CompareOptions, [str(recipe), "--compare.seeds", *words], "trivium compare", "")
        assert given.compare is not None
        assert given.compare.seeds == (1, 2)


def test_a_flag_reaches_into_a_variant_and_into_another_kind_of_task(recipe, tmp_path):
    from trivium.commands.compare import CompareOptions
    from trivium.commands.recipes import read_recipe

    words = [str(recipe), "--compare.variants.local.model.layers", "attention(window=2)*1"]
    _, given = read_recipe(CompareOptions, words, "trivium compare", "")
    assert given.compare is not None
    assert given.compare.variants["local"] == {"model.layers": "attention(window=2)*1"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n')
    words = [str(recipe), "--task.kind", "jsonl", *(f"--task.{split}={rows}" for split in ("train", "test"))]
    _, given = read_recipe(CompareOptions, words, "trivium compare", "")
    assert given.task.kind == "jsonl"


def test_a_recipe_that_a_flag_mends_is_accepted(recipe, tmp_path):
    from trivium.commands.recipes import read_recipe
    from trivium.commands.train import TrainOptions

    path = tmp_path / "broken.yaml"
    path.write_text(RECIPE.replace("steps: 3", "steps: many"))
    _, given = read_recipe(TrainOptions, [str(path), "--train.steps", "5"], "trivium train", "")
    assert given.train.steps == 5


def test_options_may_stand_before_the_recipe(capsys, recipe, tmp_path):
    status, out, _ = run(capsys, "train", "--runs", tmp_path, "--train.steps", "1", recipe)
    assert status == 0
    assert str(tmp_path) in out


def test_training_again_returns_the_finished_run(capsys, recipe, trained):
    renewed = ("run.lock", "report.html")
    before = {
        path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file() and path.name not in renewed
    }
    status, out, _ = run(capsys, "train", recipe, "--runs", trained.parent.parent)
    assert status == 0
    assert f"run folder: {trained}" in out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_trained_run_is_scored_as_json(capsys, trained):
    status, out, _ = run(capsys, "eval", trained, "--examples", 5, "--json")
    scores = json.loads(out)
    assert status == 0
    assert scores["exact_match"]["n"] == 5
    assert scores["split"] == "test"
    status, out, _ = run(capsys, "eval", trained, "--examples", 5, "--split", "validation")
    assert status == 0
    assert "exact match" in out


def test_written_problems_are_scored_as_ones_own_data(capsys, recipe, trained, tmp_path):
    status, out, _ = run(capsys, "data", "write", recipe, "--count", 6, "--out", tmp_path, "--split", "test")
    assert status == 0
    assert out.startswith(f"{tmp_path / 'test.jsonl'}: 6 problems")
    status, out, _ = run(capsys, "eval", trained, "--data", tmp_path / "test.jsonl", "--json")
    assert status == 0
    assert json.loads(out)["exact_match"]["n"] == 6


def test_a_problem_is_shown_with_its_tokens_positions_and_scored_places(capsys, recipe):
    status, out, _ = run(capsys, "data", "show", recipe, "--expression", "99+21")
    rows = {line.split("  ")[0].strip(): line.split() for line in out.splitlines() if line.strip()}
    assert status == 0
    assert "99+12=021<end>" in out
    assert rows["token"][1:] == ["9", "9", "+", "1", "2", "=", "0", "2", "1", "<end>"]
    assert rows["position id"][2:] == ["1", "2", "0", "1", "2", "0", "1", "2", "3", "0"]
    assert rows["scored"][1:] == ["·"] * 6 + ["yes"] * 4


@pytest.mark.parametrize("width", ["40", "80", "200"])
def test_a_long_problem_keeps_every_token_on_any_screen(capsys, recipe, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    status, out, _ = run(capsys, "data", "show", recipe, "--task.format", "column", "--expression", "99+21", "--model.positions", "learned")  # fmt: skip  # noqa: E501
    ids = [word for line in out.splitlines() if line.strip().startswith("id ") for word in line.split()[1:]]
    assert status == 0
    assert "…" not in out
    assert len(ids) == len("99+21=") + 1 + len("9+1=10 9+2+1=12") + 1 + len("120") + 1


def test_chat_answers_and_leaves_on_quit(capsys, trained, monkeypatch, tmp_path):
    talk = tmp_path / "lines"
    talk.write_text("12+34\nwhat?\nquit\n99+99\n")
    with talk.open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        status, out, err = run(capsys, "chat", trained)
    assert (status, err) == (0, "")
    assert "21+43=" in out
    assert "'w'" in out or "'W'" in out
    assert "99+99" not in out


def test_a_run_is_scored_again_in_the_arithmetic_of_its_own_test_or_in_that_asked_for(capsys, trained, tmp_path):
    narrow = shutil.copytree(trained, tmp_path / "run")
    config = yaml.safe_load((narrow / "config.yaml").read_text())
    config["evaluate"]["precision"] = "training"
    (narrow / "config.yaml").write_text(yaml.safe_dump(config))
    result = json.loads((narrow / "result.json").read_text())
    (narrow / "result.json").write_text(json.dumps(result | {"precision": "bfloat16"}))
    assert run(capsys, "export", narrow, tmp_path / "model")[0] == 0
    (tmp_path / "problems.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')

    def precision(folder, *more):
        return json.loads(run(capsys, "eval", folder, "--examples", 2, "--json", *more)[1])["precision"]

    assert precision(trained) == precision(narrow, "--precision", "float32") == "float32"
    assert precision(narrow) == precision(narrow, "--data", tmp_path / "problems.jsonl") == "bfloat16"
    assert precision(tmp_path / "model") == precision(trained, "--precision", "bfloat16") == "bfloat16"
    environment = json.loads((narrow / "environment.json").read_text())
    (narrow / "environment.json").write_text(json.dumps(environment | {"precision": {"name": "float16"}}))
    for name in ("result.json", "model"):
        (narrow / name).rename(tmp_path / f"no-{name}")
    assert precision(narrow) == "float16"  # of its newest checkpoint


def test_an_exported_model_is_read_like_the_run(capsys, trained, tmp_path):
    assert run(capsys, "export", trained, tmp_path / "model")[0] == 0
    one = json.loads(run(capsys, "eval", trained, "--examples", 4, "--json")[1])
    other = json.loads(run(capsys, "eval", tmp_path / "model", "--examples", 4, "--json")[1])
    assert one == other
    cards = [(folder / "README.md").read_text() for folder in (trained / "model", tmp_path / "model")]
    assert cards[0] == cards[1]
    result = json.loads((trained / "result.json").read_text())
    exact = result["evaluation"]["exact_match"]
    assert f"{result['tokens']:,} tokens in {result['step']:,} steps" in cards[0]
    assert (
        f"| exact match | {exact['rate']:.2%} | {exact['low']:.2%} to {exact['high']:.2%} | {exact['n']} |" in cards[0]
    )
    repeated = cards[0].partition("`trivium train recipe.yaml`")[2].partition("```yaml\n")[2].removesuffix("```\n")
    assert config_hash(from_dict(RunConfig, yaml.safe_load(repeated))) == trained.name.rpartition("-")[2]
    assert run(capsys, "export", tmp_path / "model", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "README.md").read_text() == cards[0]


@pytest.mark.parametrize(
    "words", [["chat", "{run}"], ["eval", "{run}", "--examples", "4", "--json"], ["export", "{run}", "{out}"]]
)
def test_a_run_that_was_interrupted_is_used_from_its_newest_checkpoint_and_that_is_said(
    capsys, trained, tmp_path, words, monkeypatch
):
    run_folder = tmp_path / "run"
    shutil.copytree(trained, run_folder)
    shutil.rmtree(run_folder / "model")
    (run_folder / "result.json").unlink()
    (tmp_path / "lines").write_text("12+34\n")
    with (tmp_path / "lines").open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        status, out, err = run(capsys, *[word.format(run=run_folder, out=tmp_path / "out") for word in words])
    assert status == 0, err
    assert out
    assert "has not finished; using its newest good checkpoint, step-3" in " ".join(err.split())
    shutil.rmtree(run_folder / "checkpoints")
    outcome = run(capsys, *[word.format(run=run_folder, out=tmp_path / "elsewhere") for word in words])
    assert_refused(outcome, "no model and no checkpoint yet")
    assert not (tmp_path / "elsewhere").exists()


def test_a_report_is_drawn_from_a_run_folder(capsys, trained):
    status, out, _ = run(capsys, "report", trained)
    assert status == 0
    assert Path(out.strip()).read_text().startswith("<!")


def test_a_path_without_a_report_does_not_keep_others_from_theirs(capsys, trained, tmp_path):
    status, out, err = run(capsys, "report", tmp_path / "nowhere", trained, tmp_path)
    assert status == 2
    assert out.splitlines() == [str(trained / "report.html")]
    assert len(err.splitlines()) == 1
    assert "nowhere" in err
    assert "(and 1 more)" in err


def test_results_cannot_be_written_below_a_file(capsys, recipe, monkeypatch):
    for name in ("bench.bench_train", "ops.bench_simplicial", "latency.bench_latency"):
        monkeypatch.setattr(f"trivium.commands.{name}", None)  # refused before anything is timed
    for command in ("train", "ops", "latency"):
        status, _, err = run(capsys, "bench", command, "--out", recipe / "x.json")
        assert (status, err) == (2, f"trivium: {recipe}: file exists\n")


def test_a_study_ends_with_tables_a_report_and_what_to_try_next(capsys, recipe, tmp_path):
    status, out, err = run(capsys, "compare", recipe, "--runs", tmp_path / "runs", "--jobs", 1)
    assert status == 0, err
    (study,) = (tmp_path / "runs").iterdir()
    assert "What each token taught" in out
    last = out.strip().splitlines()[-4:]
    assert last[0].startswith(f"report:  {study / 'report.html'}")
    assert last[1].startswith(f"try it:  trivium chat {study}")
    assert (study / "report.html").is_file()
    assert Path(last[1].split()[-1]).is_dir()
    status, out, _ = run(capsys, "compare", recipe, "--runs", tmp_path / "runs", "--jobs", 1, "--json")
    assert status == 0
    assert json.loads(out)["status"] == "finished"
    figure = tmp_path / "pictures" / "curves.svg"
    status, out, _ = run(capsys, "report", study, "--figure", figure)
    assert status == 0
    assert out.splitlines() == [str(study / "report.html"), str(figure)]
    assert "<svg" in figure.read_text()


def test_the_doctor_knows_operators_extras_and_what_is_registered(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    findings = json.loads(out)
    assert status == 0
    assert findings["operators"]["simplicial"]["reference"] == "available"
    assert "addition" in findings["tasks"]
    assert "attention" in findings["mixers"]
    assert "decoder" in findings["models"]
    assert run(capsys, "doctor")[0] == 0


def test_the_doctor_gives_the_command_for_a_missing_extra(monkeypatch):
    from trivium import doctor

    monkeypatch.setattr(doctor, "EXTRAS", {"hf": ("surely_not_installed",)})
    assert doctor.examine()["extras"] == {"hf": "missing surely_not_installed: pip install 'trivium[hf]'"}


def test_the_doctor_knows_every_package_of_every_extra():
    from trivium import doctor

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert list(doctor.EXTRAS) == list(extras)
    names = {"flash-linear-attention": "fla", "pytest-xdist": "xdist"}
    for extra, packages in extras.items():
        if extra != "dev":  # which brings packages of other extras too
            found = [re.split(r"[>=\[;]", package)[0] for package in packages]
            assert [names.get(name, name.replace("-", "_")) for name in found] == list(doctor.EXTRAS[extra])


def test_scores_of_nothing_are_printed_as_such(capsys):
    nothing = {"rate": None, "low": 0.0, "high": 1.0, "successes": 0, "n": 0}
    show_scores(
        {
            "task": "addition",
            "task_version": 1,
            "split": "test",
            "examples": 1,
            "exact_match": {"rate": 0.0, "low": 0.0, "high": 0.8, "successes": 0, "n": 1},
            "errors": {"errors": 1, "n": 1, "upper": 1.0},
            "token_accuracy": 0.0,
            "generated_tokens_per_problem": 3.0,
            "by_tag": {},
            "chain": {"problems": 1, "steps_true": nothing},
            "samples": {"right": [], "wrong": []},
        }
    )
    assert "chain, steps true: none to judge (0 of 0)" in capsys.readouterr().out


def test_answers_are_kept_and_compared_with_those_of_another_run(trained, tmp_path, capsys):
    path = tmp_path / "kept" / "answers.jsonl"
    status, out, _ = run(capsys, "eval", trained, "--examples", 5, "--answers", path, "--json")
    assert status == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(row["correct"] for row in rows) == json.loads(out)["exact_match"]["successes"]
    for other in (path, trained):
        status, out, _ = run(capsys, "eval", trained, "--examples", 5, "--against", other, "--json")
        test = json.loads(out)["against"]["exact_match"]
        assert (status, test["both"] + test["neither"], test["p"]) == (0, 5, 1)
    assert "McNemar p = 1" in run(capsys, "eval", trained, "--examples", 5, "--against", path)[1]
    assert_refused(run(capsys, "eval", trained, "--examples", 4, "--against", path), "5 answers, of 4 problems")
    path.write_text("{}")
    assert_refused(run(capsys, "eval", trained, "--against", path), "answers.jsonl:1")


def test_the_perplexity_of_a_file_is_printed_with_its_form(trained, tmp_path, capsys):
    (tmp_path / "sums.txt").write_text("12+34=46")
    status, out, _ = run(capsys, "eval", trained, "--perplexity", tmp_path / "sums.txt", "--window", 4, "--json")
    found = json.loads(out)
    assert (status, found["tokens"], found["form"], found["window"]) == (0, 8, "windowed", 4)
    words = ["eval", trained, "--perplexity", tmp_path / "sums.txt", "--window", 4, "--stride", 2]
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "strided by 2, window 4" in out
    assert "bits per byte" in out
