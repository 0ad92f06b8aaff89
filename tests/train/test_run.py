import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file

import trivium
from tests.train.tiny import broken_at, tiny_config, weights
from trivium.config import UserError, to_yaml
from trivium.train.checkpoint import model_tensors, save_checkpoint
from trivium.train.loop import train
from trivium.train.run import Run, open_run, read_config


def test_a_new_run_folder_holds_the_resolved_configuration(tmp_path):
    open_run(tmp_path / "a" / "run", tiny_config()).close()
    assert read_config(tmp_path / "a" / "run") == tiny_config()
    assert (tmp_path / "a" / "run" / "config.yaml").read_text() == to_yaml(tiny_config())


def test_a_folder_of_another_configuration_is_refused_with_what_differs_and_left_alone(tmp_path):
    open_run(tmp_path, tiny_config()).close()
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"train\.learning_rate is 0\.003 there and 0\.001 here; give another folder"):
        open_run(tmp_path, tiny_config(learning_rate=1e-3))
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_fields_that_do_not_change_results_may_differ(tmp_path):
    open_run(tmp_path, tiny_config()).close()
    open_run(tmp_path, tiny_config(keep=9, save_every=1)).close()


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"not a run folder: it holds thesis\.tex"):
        open_run(tmp_path, tiny_config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError, match="run"):
        open_run(tmp_path / "run", tiny_config())


def test_two_runs_cannot_hold_one_folder_and_a_stale_lock_does_not_block(tmp_path):
    first = open_run(tmp_path, tiny_config())
    with pytest.raises(UserError, match=f"is being trained by another process \\(process {os.getpid()}\\)"):
        open_run(tmp_path, tiny_config())
    first.close()
    (tmp_path / "run.lock").write_text("process 1")
    open_run(tmp_path, tiny_config()).close()


def test_a_folder_that_a_process_left_before_its_configuration_is_taken(tmp_path):
    (tmp_path / "run.lock").write_text("process 1")
    (tmp_path / ".config.yaml.00ff.tmp").write_text("ha")
    open_run(tmp_path, tiny_config()).close()
    assert read_config(tmp_path) == tiny_config()


def test_a_damaged_result_is_reported_as_such(tmp_path):
    (tmp_path / "result.json").write_text('{"status": ')
    with pytest.raises(UserError, match=r"result\.json: cannot be read as JSON"):
        Run(tmp_path, tiny_config()).result()


def test_a_damaged_configuration_is_named_with_its_file(tmp_path):
    open_run(tmp_path, tiny_config()).close()
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("width:", "widht:"))
    for read in (lambda: read_config(tmp_path), lambda: open_run(tmp_path, tiny_config())):
        with pytest.raises(UserError, match=r"config\.yaml: model\.widht: unknown key; did you mean 'width'"):
            read()


def test_loading_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        trivium.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run or model folder"):
        trivium.load(tmp_path)
    open_run(tmp_path, tiny_config()).close()
    with pytest.raises(UserError, match="no model and no checkpoint yet"):
        trivium.load(tmp_path)


def test_a_run_that_has_not_finished_is_loaded_from_its_newest_good_checkpoint_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "trivium")
    train(tiny_config(steps=4, save_every=2), tmp_path)
    model, tokenizer, task = trivium.load(tmp_path)
    assert tokenizer.decode(task.alphabet.encode("1+2")) == "1+2"
    assert caplog.messages == []
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    again, same, _ = trivium.load(tmp_path)
    assert same.alphabet == tokenizer.alphabet
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert "has not finished; using its newest good checkpoint, step-4" in caplog.text
    (tmp_path / "checkpoints" / "step-4" / "tensors.safetensors").write_bytes(b"x")
    before, _, _ = trivium.load(tmp_path)
    assert "damaged" in caplog.text
    assert caplog.messages[-1].endswith("using its newest good checkpoint, step-2")
    assert (tmp_path / "checkpoints" / "step-4").is_dir(), "only the process that trains may move it aside"
    assert not torch.equal(before.state_dict()["embedding.weight"], model.state_dict()["embedding.weight"])


def test_a_run_with_a_checkpoint_of_another_model_is_refused(tmp_path):
    open_run(tmp_path, tiny_config()).close()
    save_checkpoint(tmp_path / "checkpoints", 3, model_tensors(torch.nn.Linear(2, 2)), {}, keep=1)
    with pytest.raises(UserError, match="a checkpoint of another model"):
        trivium.load(tmp_path)


def test_the_record_of_the_first_start_stays_and_a_continuation_is_added(tmp_path):
    train(tiny_config(steps=3), tmp_path)
    first = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "result.json").unlink()
    train(tiny_config(steps=3, threads=3), tmp_path)
    second = json.loads((tmp_path / "environment.json").read_text())
    assert [entry["step"] for entry in second.pop("continued")] == [3]
    assert first.pop("continued") == []
    assert second == first
    assert json.loads((tmp_path / "result.json").read_text())["threads"] == 1


def test_a_run_that_continues_on_another_backend_says_so_and_keeps_the_record_of_the_first(
    tmp_path, monkeypatch, caplog
):
    def stop(progress):
        if progress.step == 3:
            raise InterruptedError

    monkeypatch.setattr("trivium.train.loop.PROGRESS_SECONDS", 0)
    config = tiny_config({"layers": "attention*1"}, steps=4, save_every=2)
    with pytest.raises(InterruptedError):
        train(config, tmp_path, on_progress=stop)
    file = tmp_path / "environment.json"
    record = json.loads(file.read_text())
    here = record["operators"]["packed_attention"]
    record["operators"]["packed_attention"] = there = {"backend": "elsewhere", "reason": "another machine"}
    file.write_text(json.dumps(record))
    with caplog.at_level("WARNING", "trivium"):
        train(config, tmp_path)
    assert f"began with backend elsewhere and continues with {here['backend']}" in caplog.text
    record = json.loads(file.read_text())
    assert record["operators"]["packed_attention"] == there
    assert record["continued"][0]["operators"]["packed_attention"] == here


def test_a_run_begins_with_the_weights_of_another_whose_task_may_differ(tmp_path):
    first = tiny_config({"max_length": 20}, steps=2)
    train(first, tmp_path / "first")
    start = load_file(tmp_path / "first" / "model" / "model.safetensors")
    for folder in (tmp_path / "first", tmp_path / "first" / "model"):
        options = {"steps": 1, "learning_rate": 1e-30, "init_from": str(folder)}
        train(tiny_config({"max_length": 20}, {"max_digits": 3}, **options), tmp_path / f"from-{folder.name}")
        end = load_file(tmp_path / f"from-{folder.name}" / "model" / "model.safetensors")
        for name, tensor in start.items():
            torch.testing.assert_close(end[name], tensor, rtol=0, atol=1e-12)


def test_a_continued_run_does_not_begin_again(tmp_path, monkeypatch):
    train(tiny_config(steps=1), tmp_path / "first")
    config = tiny_config(init_from=str(tmp_path / "first"))
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        broken_at(patch, 8)
        with pytest.raises(RuntimeError, match="died"):
            train(config, tmp_path / "broken")
    train(config, tmp_path / "broken")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_weights_that_are_not_there_or_of_another_model_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.init_from: .*no run or model folder"):
        train(tiny_config(init_from=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(tiny_config(steps=1), tmp_path / "first")
    with pytest.raises(UserError, match=r"a checkpoint of another model: it lacks blocks\.2"):
        train(tiny_config({"layers": "attention*3"}, init_from=str(tmp_path / "first")), tmp_path / "other")
    (tmp_path / "first" / "model" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        train(tiny_config(init_from=str(tmp_path / "first")), tmp_path / "third")
