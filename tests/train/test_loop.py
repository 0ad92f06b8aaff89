import json
import logging
import threading
from dataclasses import replace

import pytest
import torch

from tests.train.tiny import rows, tiny_config, weights
from trivium.config import UserError, config_hash, from_dict
from trivium.data.stream import TrainStream
from trivium.ops import dispatch
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import ANSWER, CHAIN
from trivium.train import loop
from trivium.train.checkpoint import TENSORS, list_checkpoints
from trivium.train.config import RunConfig
from trivium.train.loop import train
from trivium.train.objectives import NextToken
from trivium.train.stop import StorageFailed, TrainingDiverged

# The first ten losses of the tiny run in float32 on one thread. A change that should not change numbers keeps them.
GOLDEN = [2.927095, 2.801209, 2.455522, 2.352298, 2.311019, 2.110449, 2.099953, 2.106653, 2.197984, 2.010682]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: (folder, result, progress reports)."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    progress = []
    result = train(tiny_config(), folder, on_progress=progress.append)
    return folder, result, progress


def test_ten_steps_reproduce_the_golden_losses(tmp_path):
    train(tiny_config(steps=10, log_every=1), tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


def test_a_finished_run_folder_holds_everything_that_a_reader_needs(finished):
    folder, result, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "model", "samples.jsonl"}
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["status"], result["step"], result["precision"], result["threads"]) == ("finished", 12, "float32", 1)
    assert result["evaluation"]["exact_match"]["n"] == 10
    assert result["examples"] == 12 * 16
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-9", "step-12"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["verdict"] for sample in samples} <= {"right", "wrong"}
    assert samples
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["precision"] == {"name": "float32", "reason": "asked for"}
    assert environment["torch"] == torch.__version__


def test_runs_of_one_process_record_each_their_own_operators_and_why(tmp_path):
    layers = "simplicial(window1=4, window2=2)*1"
    models = [
        {"layers": layers},
        {"layers": layers, "backends": {"simplicial": "reference", "adamw": "torch"}},
        {"layers": layers},  # chosen before, recorded again
        {"layers": "attention*1"},
    ]
    records = []
    for number, model in enumerate(models):
        train(tiny_config(model, steps=1), tmp_path / str(number))
        records.append(json.loads((tmp_path / str(number) / "environment.json").read_text())["operators"])
    native = dispatch.backends("packed_attention")["native"] is None
    attention = {"packed_attention"} if native else {"packed_attention", "attention"}
    everywhere = {"adamw", "add_norm", "linear"}
    assert [set(record) for record in records] == [everywhere | {"simplicial"}] * 3 + [everywhere | attention]
    assert [record["simplicial"]["backend"] for record in records[:3]] == ["torch", "reference", "torch"]
    assert records[1]["simplicial"]["reason"] == records[1]["adamw"]["reason"] == "asked for by name"
    assert records[1]["adamw"]["backend"] == "torch"
    assert records[3]["packed_attention"]["backend"] == ("native" if native else "torch")


@pytest.mark.parametrize("mixer", ["attention", "simplicial"])
def test_every_norm_trains_under_bfloat16_autocast_without_a_warning(mixer, tmp_path):
    model = {"layers": f"{mixer}(qk_norm=true)*2", "norm": "rmsnorm", "feedforward": "swiglu", "dropout": 0.1}
    result = train(tiny_config(model, steps=2, precision="bfloat16"), tmp_path / "run")
    assert (result["precision"], result["step"]) == ("bfloat16", 2)


def test_rows_come_when_they_are_due_and_count_tokens_and_examples(finished):
    folder, result, _ = finished
    train_rows, validation_rows = rows(folder, "train"), rows(folder, "validation")
    assert [row["step"] for row in train_rows] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in validation_rows] == [4, 8, 12]
    task = AdditionConfig(max_digits=2).build()
    tokens = sum(int(task.batch("train", step * 16, 16).lengths_B.sum()) for step in range(12))
    assert train_rows[-1]["tokens"] == result["tokens"] == tokens
    assert set(validation_rows[-1]) >= {"loss", "token_accuracy", "exact_match", "count", "tokens", "examples"}
    assert validation_rows[-1]["count"] == 20
    assert {key: validation_rows[-1][key] for key in result["validation"]} == result["validation"]


def test_progress_ends_at_the_last_step_with_nothing_left(finished):
    _, result, progress = finished
    last = progress[-1]
    assert (last.step, last.steps, last.tokens, last.seconds_left) == (12, 12, result["tokens"], 0.0)
    assert last.exact_match == result["validation"]["exact_match"]


def test_a_finished_run_is_returned_without_training_again(finished):
    folder, result, _ = finished
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert train(tiny_config(), folder) == result
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_threads_of_the_caller_come_back(tmp_path):
    before = torch.get_num_threads()
    train(tiny_config(steps=1, threads=before + 1), tmp_path / "run")
    assert torch.get_num_threads() == before


def test_accumulated_parts_give_the_losses_of_one_pass(finished, tmp_path):
    folder, _, _ = finished
    train(tiny_config(micro_batch=5), tmp_path / "parts")
    one = [row["loss"] for row in rows(folder, "train")]
    parts = [row["loss"] for row in rows(tmp_path / "parts", "train")]
    assert parts == pytest.approx(one, rel=1e-5)


def test_a_run_outside_the_main_thread_gives_the_same_rows(finished, tmp_path):
    folder, _, _ = finished
    worker = threading.Thread(target=train, args=(tiny_config(), tmp_path / "run"))
    worker.start()
    worker.join()
    assert rows(tmp_path / "run") == rows(folder)


def test_a_length_in_tokens_ends_with_the_step_that_reaches_it(tmp_path):
    result = train(tiny_config(tokens=700), tmp_path / "run")
    before_last = rows(tmp_path / "run", "train")[-2]["tokens"]
    assert before_last < 700 <= result["tokens"]


def test_a_length_in_epochs_passes_over_a_finite_set(tmp_path):
    result = train(tiny_config(epochs=2, task={"train_examples": 40}), tmp_path / "run")
    assert (result["step"], result["examples"]) == (5, 80)


def test_epochs_of_an_infinite_task_are_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(UserError, match=r"train\.epochs"):
        train(tiny_config(epochs=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_backend_is_refused_before_a_run_that_would_never_call_it(tmp_path, monkeypatch):
    step = dispatch.Backend(lambda: pytest.fail("called"), missing=lambda: "no such machine")
    monkeypatch.setitem(dispatch._registered["cached_step"], "triton", step)
    config = tiny_config(model={"backends": {"cached_step": "triton"}})
    with pytest.raises(UserError, match="cached_step: backend 'triton' is missing: no such machine; allowed"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_without_test_problems_is_refused_before_it_is_trained_on(tmp_path):
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation")}
    for number, path in enumerate(files.values()):
        path.write_text(json.dumps({"prompt": f"{number}+1=", "answer": str(number + 1)}) + "\n")
    config = from_dict(RunConfig, {"task": {"kind": "jsonl", **files}, "train": {"steps": 1, "batch": 1}})
    with pytest.raises(UserError, match="test"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_close_to_float32(finished, tmp_path, precision):
    folder, _, _ = finished
    config = tiny_config(precision=precision)
    result = train(config, tmp_path / "run")
    assert result["precision"] == precision
    assert result["evaluation"]["precision"] == "float32"
    narrow = replace(config, evaluate=replace(config.evaluate, precision="training"))
    assert config_hash(narrow) != config_hash(config)
    if precision == "bfloat16":
        assert train(narrow, tmp_path / "narrow")["evaluation"]["precision"] == "bfloat16"
    assert result["train_loss"] == pytest.approx(rows(folder, "train")[-1]["loss"], rel=0.05)


def test_the_chain_can_be_masked_from_the_loss(tmp_path):
    task = {"format": "reversed_chain"}
    scored = train(tiny_config(task=task, steps=4), tmp_path / "scored")
    masked = train(tiny_config(task=task, steps=4, chain_loss=False), tmp_path / "masked")
    assert scored["tokens"] == masked["tokens"]
    assert scored["train_loss"] != masked["train_loss"]


def test_a_compiled_model_gives_the_same_losses(finished, tmp_path, monkeypatch):
    # Which code the compiler makes is its own matter; here only the road through torch.compile is taken.
    folder, _, _ = finished
    torch._dynamo.reset()  # what another test compiled would count as a change here
    compile_eagerly = torch.compile
    monkeypatch.setattr(loop.torch, "compile", lambda model: compile_eagerly(model, backend="eager"))
    train(tiny_config(compile=True), tmp_path / "run")
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx([row["loss"] for row in rows(folder)])


def test_a_loss_that_is_not_finite_names_step_indices_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = tiny_config()
    stream = TrainStream(config.task.build(), 16, 0)
    loss_sum, calls = NextToken.loss_sum, []

    def poisoned(self, *arguments):
        calls.append(None)
        return loss_sum(self, *arguments) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setattr(NextToken, "loss_sum", poisoned)
    with pytest.raises(
        TrainingDiverged, match=r"step 8: the loss is nan on training indices 112\.\.127;.*step-6"
    ) as caught:
        train(config, tmp_path / "run")
    assert caught.value.indices == stream.indices(7).tolist()
    assert caught.value.checkpoint == tmp_path / "run" / "checkpoints" / "step-6"
    assert rows(tmp_path / "run", "train")[-1]["step"] == 6


def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_continues_it(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    save, full = loop.save_checkpoint, True

    def refuse(path, step, *arguments, **options):
        if step == 6 and full:
            raise OSError(28, "No space left on device")
        return save(path, step, *arguments, **options)

    monkeypatch.setattr(loop, "save_checkpoint", refuse)
    with pytest.raises(StorageFailed, match=r"No space left on device; the last good checkpoint is .*step-3"):
        train(tiny_config(), tmp_path / "run")
    full = False
    train(tiny_config(), tmp_path / "run")
    assert rows(tmp_path / "run") == rows(folder)
    assert weights(tmp_path / "run") == weights(folder)


def test_a_damaged_newest_checkpoint_is_reported_and_the_run_ends_as_if_nothing_had_been(finished, tmp_path, caplog):
    folder, _, _ = finished
    train(tiny_config(), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    tensors = tmp_path / "run" / "checkpoints" / "step-12" / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "trivium"):
        train(tiny_config(), tmp_path / "run")
    assert "step-12: damaged" in caplog.text
    assert rows(tmp_path / "run") == rows(folder)
    assert weights(tmp_path / "run") == weights(folder)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-9", "step-12", "damaged-step-12"}


def test_a_model_learns(tmp_path):
    config = from_dict(
        RunConfig,
        {
            "task": {"kind": "addition", "max_digits": 1, "train_examples": 64},
            "model": {"width": 32, "heads": 2, "positions": "learned", "layers": "attention*2"},
            "train": {"steps": 150, "batch": 64, "eval_every": 150, "precision": "float32", "threads": 1},
            "evaluate": {"examples": 4},
        },
    )
    result = train(config, tmp_path / "run")
    assert result["train_loss"] < 0.05


def test_a_run_may_end_after_so_many_tokens_of_chains_and_answers(tmp_path):
    config = tiny_config(task={"format": "column"}, steps=None, generated_tokens=900)
    result = train(config, tmp_path)
    task, counted = config.task.build(), []
    for step in range(result["step"]):
        regions = task.batch("train", 16 * step, 16).regions_BT
        counted.append(int(((regions == CHAIN) | (regions == ANSWER)).sum()))
    assert sum(counted[:-1]) < 900 <= sum(counted) == result["generated_tokens"]
    assert result["tokens"] > result["generated_tokens"]
    assert rows(tmp_path, "validation")[-1]["generated_tokens"] == result["generated_tokens"]
    with pytest.raises(UserError, match="generated_tokens: given beside steps"):
        tiny_config(generated_tokens=900)
