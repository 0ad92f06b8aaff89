"""The commands as people meet them: bad input gets one or two clear lines."""

import os
import sys
from pathlib import Path

import pytest

from tests.commands.line import RECIPE, assert_refused, run

BAD_FLAGS = [
    ([], "give a recipe: trivium train RECIPE"),
    (["none.yaml"], "none.yaml: no such file"),
    (["{recipe}", "--train.stesp", "3"], "unknown flag '--train.stesp'; did you mean '--train.steps'?"),
    (["{recipe}", "--steps", "3"], "unknown flag '--steps'; did you mean '--train.steps'?"),
    (["{recipe}", "--train.steps"], "--train.steps"),
    (["{recipe}", "--train.steps", "many"], "train.steps: expected a whole number, got 'many'"),
    (["{recipe}", "--train.steps", "1.5"], "train.steps: expected a whole number, got 1.5"),
    (["{recipe}", "--train.steps", "0"], "train.steps"),
    (["{recipe}", "--train.batch", "0"], "train.batch"),
    (["{recipe}", "--train.learning-rate", "fast"], "train.learning_rate: expected a number, got 'fast'"),
    (["{recipe}", "--train.schedule", "cosin"], "did you mean 'cosine'?"),
    (["{recipe}", "--train.device", "gpu0"], "train.device"),
    (["{recipe}", "--train.epochs", "2"], "train"),
    (["{recipe}", "--model.width", "15"], "width"),
    (["{recipe}", "--model.heads", "0"], "heads"),
    (["{recipe}", "--model.layers", "attention(window=0)"], "window"),
    (["{recipe}", "--model.layers", "atention*2"], "did you mean 'attention'?"),
    (["{recipe}", "--model.layers", "attention(windw=3)"], "did you mean 'window'?"),
    (["{recipe}", "--model.layers", "attention*"], "layers"),
    (["{recipe}", "--model.positions", "blok"], "did you mean 'block'?"),
    (["{recipe}", "--task.max-digits", "0"], "max_digits"),
    (["{recipe}", "--task.min-digits", "3"], "min_digits"),
    (["{recipe}", "--task.base", "1"], "base"),
    (["{recipe}", "--task.test-fraction", "0.999", "--task.validation-fraction", "0.5"], "fraction"),
    (["{recipe}", "--task.kind", "adition"], "did you mean 'addition'?"),
    (["{recipe}", "--variant", "lokal"], "did you mean 'local'?"),
    (["{recipe}", "another.yaml"], "no place for this argument"),
    (["{recipe}", "--runs", "{recipe}/below"], "below"),
    (["{recipe}", "--runs", "/proc/runs"], "no folder can be made at /proc/runs"),
    (["{folder}"], "cannot be read"),
]


@pytest.mark.parametrize(
    ("words", "message"), BAD_FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_to_train_is_one_clear_line(capsys, recipe, words, message, tmp_path):
    words = [word.format(recipe=recipe, folder=recipe.parent) for word in words]
    if "--runs" not in words:
        words += ["--runs", str(tmp_path / "runs")]
    assert_refused(run(capsys, "train", *words), message)
    assert not (tmp_path / "runs").exists(), "a refused command left something behind"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("width", "widht"), "model.widht: unknown key; did you mean 'width'?"),
        (RECIPE.replace("heads: 2", "heads: two"), "model.heads: expected a whole number, got 'two'"),
        (RECIPE.replace("steps: 3,", "steps: 3, steps: 4,"), "key 'steps' is given twice"),
        (RECIPE.replace("task:  {", "task:  {{"), "not valid YAML"),
        (RECIPE.replace("kind: addition", "kind: divination"), "unknown task 'divination'"),
        (RECIPE + "comparison: 3\n", "comparison: unknown key; did you mean 'compare'?"),
        ("", "this file holds nothing"),
        ("train:\n", "train: expected a mapping of keys, got nothing"),
        (RECIPE.replace("local: {", "attention: {"), "key 'attention' is given twice"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_file_and_key(capsys, tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert_refused(run(capsys, "train", path, "--runs", tmp_path / "runs"), message, "bad.yaml")


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ("attention(window=99)*1", "are the same"),
        ("attention*1", "are the same"),
    ],
)
def test_compare_refuses_a_control_that_equals_another_variant(capsys, recipe, tmp_path, local, message):
    words = [recipe, "--runs", tmp_path / "runs", "--compare.variants.local.model.layers", local]
    assert_refused(run(capsys, "compare", *words), message)
    assert not (tmp_path / "runs").exists()


def test_block_positions_are_refused_for_a_task_without_digits(capsys, recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "ab", "answer": "c"}\n{"prompt": "ba", "answer": "c"}\n')
    splits = [f"--task.{split}={rows}" for split in ("train", "validation", "test")]
    assert_refused(run(capsys, "train", recipe, "--task.kind", "jsonl", *splits, "--runs", tmp_path / "r"), "block")


@pytest.mark.parametrize("command", ["eval", "chat", "report", "export"])
@pytest.mark.parametrize("place", ["missing", "empty", "file"])
def test_what_is_not_a_run_folder_is_refused(capsys, tmp_path, command, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    more = [tmp_path / "out"] if command == "export" else []
    assert_refused(run(capsys, command, tmp_path / place, *more), place)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(capsys, trained, tmp_path) -> Path:
    """A model folder that a test may damage."""
    assert run(capsys, "export", trained, tmp_path / "model")[0] == 0
    return tmp_path / "model"


def test_truncated_weights_are_refused(capsys, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(run(capsys, "eval", model), "model.safetensors")
    weights.write_bytes(b"")
    assert_refused(run(capsys, "eval", model), "model.safetensors")
    weights.unlink()
    assert_refused(run(capsys, "chat", model), "model.safetensors")


def test_weights_of_another_model_are_refused(capsys, model):
    config = model / "config.json"
    config.write_text(config.read_text().replace('"width": 16', '"width": 32'))
    assert_refused(run(capsys, "eval", model))


def test_a_damaged_model_config_is_refused(capsys, model):
    (model / "config.json").write_text("{")
    assert_refused(run(capsys, "eval", model), "config.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "mine.jsonl:2"),
        ('{"prompt": "1+1="}', "mine.jsonl:2"),
        ('{"prompt": 3, "answer": "4"}', "mine.jsonl:2"),
        ("[1, 2]", "mine.jsonl:2"),
        ('{"prompt": "1+?=", "answer": "4<end>"}', "'?'"),
        ('{"prompt": "123456789+123456789=", "answer": "4<end>"}', "too long"),
    ],
)
def test_a_bad_line_of_data_is_named_with_file_and_line(capsys, trained, tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2<end>"}\n' + line + "\n")
    assert_refused(run(capsys, "eval", trained, "--data", path), message, "mine.jsonl")


def test_missing_data_is_refused(capsys, trained, tmp_path):
    assert_refused(run(capsys, "eval", trained, "--data", tmp_path / "none.jsonl"), "none.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "{run}", "--examples", "0"], "examples"),
        (["eval", "{run}", "--perplexity", "x.txt", "--answers", "a.jsonl"], "--answers: given beside --perplexity"),
        (["eval", "{run}", "--perplexity", "x.txt", "--temperature", "1"], "--temperature: given beside --perplexity"),
        (["eval", "{run}", "--data", "x.jsonl", "--calculator"], "--calculator: given beside --data"),
        (["eval", "{run}", "--stride", "4"], "--stride: belongs to --perplexity"),
        (["eval", "{run}", "--calculator", "--temperature", "1"], "--calculator: generates greedily"),
        (["eval", "{run}", "--against", "nowhere"], "nowhere"),
        (["eval", "{run}", "--perplexity", "nowhere.txt"], "nowhere.txt"),
        (["eval", "{run}", "--examples", "few"], "trivium: --examples: expected a whole number, got 'few'\n"),
        (["eval", "{run}", "--lengths", "1", "a"], "trivium: --lengths: expected a whole number, got 'a'\n"),
        (
            ["eval", "{run}", "--split", "tset"],
            "trivium: --split: 'tset' is not allowed; allowed: test, validation, train\n",
        ),
        (["eval", "{run}", "--temperature", "-1"], "temperature"),
        (["eval", "{run}", "--tempertaure", "1"], "did you mean '--temperature'?"),
        (["eval", "{run}", "--temperature"], "trivium: --temperature: give its value behind it\n"),
        (["eval"], "trivium: PATH is missing: Run folder"),
        (["chat", "{run}", "--temperature", "-1"], "temperature"),
        (["chat", "{run}", "--max-tokens", "0"], "max_new_tokens"),
        (["data", "show", "{recipe}", "--expression", "9x+1"], "9x+1"),
        (["data", "show", "{recipe}", "--count", "0"], "count"),
        (["data", "write", "{recipe}", "--count", "0", "--out", "out"], "count"),
        (["data", "write", "{recipe}", "--count", "3", "--out", "{recipe}/below"], "below"),
        (["data", "write", "{recipe}", "--count", "3", "--out", "/proc/rows"], "no folder can be made at /proc/rows"),
        (["data", "write", "{recipe}"], "--count is missing: "),
        (["data"], "unknown command 'data'"),
        (["data", "shwo"], "did you mean 'data show'?"),
        (["trian"], "did you mean 'train'?"),
        (["report"], "give at least one run folder"),
        (["report", "{run}", "{run}", "--figure", "x.svg"], "--figure: give one study"),
        (["report", "{run}", "--figure", "x.jpg"], "--figure: x.jpg: give a name that ends in .svg or .png"),
        (["bench", "ops", "--figure", "x"], "--figure: x: give a name that ends in .svg or .png"),
        (["report", "{run}", "--figure", "x.svg"], "is a run's folder; give a study's"),
        (["compare", "{recipe}", "--jobs", "0"], "jobs"),
        (["export", "{run}", "{recipe}/below"], "below"),
        (["export", "{run}", "{run}"], "{run}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_clear_line(capsys, recipe, trained, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"run": trained, "recipe": recipe}
    assert_refused(run(capsys, *[word.format(**names) for word in words]), message.format(**names))
    assert not (tmp_path / "runs").exists(), "a refused command left something behind"


@pytest.mark.parametrize(
    ("flag", "module"),
    [
        ("--track.tensorboard=true", "torch.utils.tensorboard"),
        ("--track.wandb=p", "wandb"),
        ("--track.trackio=p", "trackio"),
    ],
)
def test_an_extra_that_is_not_installed_is_named_with_the_pip_command(
    capsys, recipe, tmp_path, monkeypatch, flag, module
):
    monkeypatch.setitem(sys.modules, module, None)
    outcome = run(capsys, "train", recipe, flag, "--runs", tmp_path / "runs")
    assert_refused(outcome, "pip install 'trivium[track]'")
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_is_full_when_a_report_is_drawn_keeps_the_earlier_one(capsys, trained, monkeypatch):
    assert run(capsys, "report", trained)[0] == 0
    before = (trained / "report.html").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, out, err = run(capsys, "report", trained)
    assert (status, out) == (1, "")
    assert err == f"trivium: {trained / 'report.html'}: the disk is full; what was written before is kept\n"
    assert (trained / "report.html").read_bytes() == before
    assert not list(trained.glob(".*.tmp"))


def test_a_diverged_run_ends_with_one_line_and_exit_status_1(capsys, recipe, tmp_path):
    words = ["--train.learning-rate", "1e30", "--train.clip", "null", "--train.warmup", "0", "--train.steps", "30"]
    status, _, err = run(capsys, "train", recipe, "--runs", tmp_path, *words)
    assert status == 1
    assert "not finite" in err or "nan" in err or "inf" in err
    assert "Traceback" not in err
