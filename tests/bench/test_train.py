"""The training benchmark: both programs compute the same, and the table says which row is which."""

import dataclasses
import json
import sys

import pytest
import torch

from trivium import cli
from trivium.bench import train as bench
from trivium.model.decoder import Decoder
from trivium.tasks.addition import AdditionConfig
from trivium.train import precision


@pytest.fixture
def tiny(monkeypatch):
    """A shape that takes a moment, in place of the real ones."""
    shape = bench.Shape("0.1M", 16, 2, 2, 24, 4, AdditionConfig(max_digits=2, zero_pad=True), 12)
    monkeypatch.setattr(bench, "SHAPES", {"0.1M": shape})
    return shape


@pytest.mark.parametrize(("name", "parameters", "tokens"), [("2.1M", 2.1e6, 32), ("0.1M", 0.1e6, 12)])
def test_both_programs_give_the_same_first_loss_at_the_stated_size(name, parameters, tokens):
    shape = dataclasses.replace(bench.SHAPES[name], batch=4)
    gate = bench.check_first_loss(shape)
    assert gate["trivium"] == pytest.approx(gate["trainer"], rel=bench.TOLERANCE)
    assert gate["parameters"] == pytest.approx(parameters, rel=0.05)
    assert gate["tokens"] == tokens


def test_nothing_is_timed_when_the_first_losses_differ(tiny, monkeypatch):
    copy = bench.gpt2_like

    def wrong(ours, shape):
        theirs = copy(ours, shape)
        with torch.no_grad():
            theirs.transformer.h[0].mlp.c_fc.bias.add_(0.1)
        return theirs

    monkeypatch.setattr(bench, "gpt2_like", wrong)
    with pytest.raises(RuntimeError, match="the first losses differ"):
        bench.bench_train(("0.1M",), repeats=1, steps=12)


def test_gradients_agree_with_those_of_transformers(tiny):
    task = tiny.task.build()
    config = tiny.model()
    ours = config.build(bench.model_context(task, config))
    assert isinstance(ours, Decoder)
    theirs = bench.gpt2_like(ours, tiny)
    batch = bench.TrainStream(task, 4, 0).batch(0)
    objective = bench.NextToken()
    weights_BT = torch.from_numpy(objective.weights(batch))
    logits_BTV, _ = ours(torch.from_numpy(batch.tokens_BT))
    targets_N, weights_N = torch.from_numpy(batch.targets_BT).flatten(), weights_BT.flatten()
    (objective.loss_sum(logits_BTV.flatten(0, 1), targets_N, weights_N) / weights_BT.sum()).backward()
    theirs(**bench.features(batch)).loss.backward()
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.transformer.wte.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("native", [True, False])
def test_the_results_have_a_row_for_each_precision_and_for_the_defaults(tiny, tmp_path, capsys, monkeypatch, native):
    for module in (bench, precision):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: (native, "as the test says"))
    out = tmp_path / "results" / "train.json"
    words = ["bench", "train", "--shape", "0.1M", "--repeats", "1", "--steps", "12", "--threads", "1"]
    assert cli.main([*words, "--json", "--out", str(out)]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads(out.read_text())
    rows = {row["row"]: row for row in results["rows"]}
    assert list(rows) == ["both float32", "both bfloat16", "own defaults"]
    # Where bfloat16 would only be emulated it is nobody's training, and the row says why it has no numbers.
    assert ("ratio" in rows["both bfloat16"]) == native
    assert native or rows["both bfloat16"]["note"] == "not timed: as the test says"
    assert f"trivium picks {'bfloat16' if native else 'float32'}" in rows["own defaults"]["note"]
    for row in rows.values():
        if "ratio" in row:
            assert row["trivium"] > 0
            assert row["ratio"] == pytest.approx(row["trivium"] / row["trainer"])
    assert {"torch", "transformers", "commit", "processor"} <= results["environment"].keys()


def test_the_results_are_a_table_for_people(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["bench", "train", "--shape", "0.1M", "--repeats", "1", "--steps", "12", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("both float32", "both bfloat16", "own defaults", "ratio"):
        assert words in out


def test_the_shape_for_a_gpu_is_refused_or_left_out_where_there_is_none(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    large = dataclasses.replace(tiny, name="6.3M", device="cuda")
    monkeypatch.setattr(bench, "SHAPES", {"0.1M": tiny, "6.3M": large})
    assert cli.main(["bench", "train", "--shape", "6.3M"]) == 2
    assert "6.3M is timed on a CUDA device, and torch sees none" in capsys.readouterr().err
    results = bench.bench_train(repeats=1, steps=12, threads=1, shapes=("0.1M", "6.3M"))
    assert results["rows"][-1]["note"] == "not timed: torch sees no CUDA device"


def test_without_transformers_the_pip_command_is_given(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["bench", "train"]) == 2
    assert "pip install 'trivium[hf]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--steps", "5"]])
def test_too_few_steps_or_repeats_are_refused(words, capsys):
    assert cli.main(["bench", "train", *words]) == 2
    assert "expected" in capsys.readouterr().err
