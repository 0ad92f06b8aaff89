import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trivium import cli
from trivium.bench import latency
from trivium.bench.latency import bench_latency, room_for
from trivium.bench.latency_models import timed_models
from trivium.commands.latency import latency as latency_command
from trivium.registry import UserError
from trivium.report.figures import to_svg
from trivium.report.latency import latency_figure

SIZES: Any = {"width": 16, "heads": 2, "layers": 2, "room": room_for((64,), 8)}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    models = timed_models(["attention", "gla", "prefix_scan(chunk=4)"], **SIZES)
    return bench_latency(models, (12, 64), steps=8, threads=1)


def test_each_mark_has_a_spread_the_bytes_of_the_real_state_and_boundaries_apart(results: dict[str, Any]):
    attention, gla, scan = results["rows"]
    for row in results["rows"]:
        assert [point["position"] for point in row["points"]] == [12, 64]
        assert (row["layers"], row["weights"]) == (2, "random")
        for point in row["points"]:
            spread = point["milliseconds"]
            assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
        medians = [point["milliseconds"]["median"] for point in row["points"]]
        assert row["ratio"] == medians[1] / medians[0]
    # Keys and values of two layers in float32, a counter each, and the model's own.
    assert [point["state_bytes"] for point in attention["points"]] == [
        2 * (2 * 16 * 4 * mark + 8) + 8 for mark in (12, 64)
    ]
    assert gla["points"][0]["state_bytes"] == gla["points"][1]["state_bytes"]
    assert gla["worst"] is None
    assert [point["boundary"]["count"] for point in scan["points"]] == [2, 2]
    assert [point["milliseconds"]["count"] for point in scan["points"]] == [6, 6]
    # 64 tokens are 16 chunks: the last of them completes four trees.
    assert (scan["worst"]["position"], scan["worst"]["merges"]) == (64, 4)


def test_a_command_that_ends_early_leaves_the_rows_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measure, out = latency._measure, tmp_path / "latency.json"

    def until_gru(model: Any, *rest: Any) -> dict[str, Any]:
        if model.name == "gru":
            raise KeyboardInterrupt
        return measure(model, *rest)

    monkeypatch.setattr(latency, "_measure", until_gru)
    words = ["--models", "gla", "gru", "--width", "16", "--heads", "2", "--layers", "1", "--marks", "8", "--steps", "2"]
    with pytest.raises(KeyboardInterrupt):
        latency_command([*words, "--device", "cpu", "--out", str(out)])
    left = json.loads(out.read_text())
    assert [row["name"] for row in left["rows"]] == ["gla"]
    assert left["not_timed"] == ["gru"]


def test_the_largest_merge_is_timed_from_the_state_before_it(monkeypatch: pytest.MonkeyPatch):
    seen = []
    step = latency.DecodeSteps.step

    def watched(steps: Any, tokens_B: torch.Tensor, active_B: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(int(steps.state.lengths_B[0]))
        return step(steps, tokens_B, active_B)

    monkeypatch.setattr(latency.DecodeSteps, "step", watched)
    bench_latency(timed_models(["prefix_scan(chunk=4)"], **SIZES), (20,), steps=4)
    assert seen.count(15) == latency.WORST_REPEATS + 1


def test_the_figure_names_every_model_and_crosses_the_largest_merge(results: dict[str, Any]):
    drawn = to_svg(latency_figure(results))
    for text in ("attention", "gla", "prefix_scan(chunk=4)", "milliseconds a token", "bytes of state"):
        assert text in drawn


def test_one_layer_stands_for_all_and_a_prefix_scan_shares_them_out():
    first, hybrid, scan = timed_models(
        ["gla", "attention(window=4) + gla", "prefix_scan(chunk=8, aggregator_layers=1, layers=gla)"], **SIZES
    )
    assert (first.name, first.mixer, first.layers) == ("gla", "gla", 2)
    assert (hybrid.name, hybrid.layers) == ("attention(window=4) + gla", 2)
    assert (scan.mixer, scan.layers, scan.chunk) == ("prefix_scan", 2, 8)
    assert timed_models(["attention(window=4)"], **SIZES)[0].mixer == "local"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["gla", "attention*3"], "attention has layers 3, gla has 2; latency is compared at equal"),
        (["glaa"], "unknown mixer 'glaa'"),
        (["prefix_scan(chunks=3)"], "unknown option 'chunks' of prefix_scan; did you mean 'chunk'"),
        (["prefix_scan(chunk)"], r"prefix_scan\(chunk\): expected option=value"),
        (["gla", "gla"], "gla is given twice"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(texts: list[str], message: str):
    with pytest.raises(UserError, match=message):
        timed_models(texts, **SIZES)


def test_every_model_takes_the_backends_that_are_named(capsys: pytest.CaptureFixture[str]):
    words = ["--models", "gla", "prefix_scan(chunk=4, layers=gla)", "--width", "16", "--heads", "2", "--layers", "2"]
    words += ["--marks", "8", "--steps", "4", "--device", "cpu", "--json"]
    assert cli.main(["bench", "latency", *words, "--backends", "gated_linear_attention", "reference"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["backends"] == {"gated_linear_attention": "reference"}
    chosen = [row["operators"]["gated_linear_attention"]["backend"] for row in results["rows"]]
    assert chosen == ["reference", "reference"]
    assert cli.main(["bench", "latency", *words, "--backends", "gla", "torch"]) == 2
    assert "backends: unknown operator 'gla'" in capsys.readouterr().err


def test_the_command_writes_results_and_a_figure_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = ["--models", "gla", "prefix_scan(chunk=4)", "--width", "16", "--heads", "2", "--layers", "2"]
    words += ["--marks", "8", "--steps", "4", "--threads", "1", "--clock", "processor"]
    out = tmp_path / "deep" / "latency.json"
    assert cli.main(["bench", "latency", *words, "--out", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads(out.read_text())
    assert results["environment"]["commit"]
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["bench", "latency", *words, "--out", str(out)]) == 0
    assert "worst merge" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--marks", "0"], "--marks: give positions of 1 or more"),
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--clock", "processor"], "--clock processor: needs --device cpu and --threads 1"),
        (["--figure", "x.gif"], "ends in .svg or .png"),
    ],
)
def test_what_cannot_be_timed_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "latency", "--models", "gla", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
