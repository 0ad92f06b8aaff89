"""`trivium bench ops`: one row a backend, against the reference."""

import functools
import json
import subprocess

import pytest

from trivium import cli
from trivium.bench import ops
from trivium.bench.clock import Clock
from trivium.bench.gates import WrongResult
from trivium.bench.kernels import bench_kernels
from trivium.registry import UserError

SMALL = ["--batch", "1", "--tokens", "12", "--head-width", "6", "--window1", "4", "--window2", "2", "--repeats", "1"]


@pytest.fixture
def here(monkeypatch):
    """Measure in this process: that a process of its own does it is a matter of test_ops."""
    monkeypatch.setattr(ops, "_in_a_process", ops._measure)


def test_each_backend_has_a_row_beside_the_reference(here, tmp_path, capsys):
    out = tmp_path / "results" / "ops.json"
    assert cli.main(["bench", "ops", *SMALL, "--json", "--out", str(out), "--threads", "1"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads(out.read_text())
    rows = {row["backend"]: row for row in results["rows"]}
    assert {"reference", "torch"} <= rows.keys()
    assert rows["reference"]["times_as_fast"] == 1
    assert rows["torch"]["tokens"] == 12


def test_a_table_is_printed_for_people(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["bench", "ops", *SMALL, "--backends", "reference"]) == 0
    out, err = capsys.readouterr()
    assert "B1 T12 H4 D6 4x2" in out
    assert "reference" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "--tokens: expected 1 or more"),
        (["--threads", "0"], "--threads: expected 1 or more"),
        (["--kv-heads", "3"], "do not divide"),
        (["--backends", "tritom"], "tritom"),
        (["--device", "cuda:9"], "cuda:9"),
    ],
)
def test_sizes_and_backends_that_cannot_be_are_refused(words, message, capsys):
    assert cli.main(["bench", "ops", *SMALL, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_result_is_no_fault_of_the_user(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "TOLERANCE", dict.fromkeys(ops.TOLERANCE, -1.0))
    monkeypatch.setattr(ops, "_in_a_process", ops._measure)
    out = tmp_path / "ops.json"
    assert cli.main(["bench", "ops", *SMALL, "--backends", "torch", "--out", str(out)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("trivium: backend torch: o is off by")
    assert not out.exists()


def test_a_measuring_process_says_whose_fault_it_was(monkeypatch):
    def ended(status: int):
        return lambda *arguments, **options: subprocess.CompletedProcess([], status, "", "first\nthe reason\n")

    for status, error in ((2, UserError), (ops.WRONG, WrongResult), (1, RuntimeError)):
        monkeypatch.setattr(subprocess, "run", ended(status))
        with pytest.raises(error, match="the reason") as caught:
            ops._in_a_process({"threads": 1, "backend": "torch"})
        assert type(caught.value) is error


@pytest.mark.parametrize(
    ("short", "name"), [("gla", "gated_linear_attention"), ("gated_delta", "gated_delta_rule")], ids=["gla", "delta"]
)
def test_linear_operators_are_timed_by_long_and_short_names(short, name, capsys):
    words = ["--batch", "1", "--tokens", "9", "--heads", "1", "--head-width", "4", "--repeats", "1"]
    assert cli.main(["bench", "ops", "--op", short, *words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["operator"] == name
    rows = {row["backend"]: row for row in results["rows"]}
    assert rows["reference"]["times_as_fast"] == 1
    assert rows["torch"]["tokens_per_second"] == 9 / rows["torch"]["forward_backward_seconds"]
    assert rows["torch"]["peak_bytes"] >= 0
    assert cli.main(["bench", "ops", "--op", name, *words]) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["scan", "--width", "8", "--chunks", "3", "--chunk", "2", "--batch", "1"], "3 chunks of 2, width 8"),
        (["decode_step", "--width", "16", "--batch", "1", "--context", "6", "--backends", "gla"], "ms predicted"),
    ],
)
def test_the_scan_and_steps_of_generation_are_operators_too(words, shown, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["bench", "ops", "--op", *words, "--repeats", "1"]) == 0
    assert shown in capsys.readouterr().out


def test_a_size_that_an_operator_does_not_have_is_refused(capsys):
    assert cli.main(["bench", "ops", "--op", "gla", "--window1", "3"]) == 2
    message = "--window1: gated_linear_attention has no such size; allowed: batch, head_width, heads, tokens"
    assert message in capsys.readouterr().err


def test_a_peer_is_timed_beside_ours_with_a_table(here, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    out, figure = tmp_path / "kernels.json", tmp_path / "kernels.svg"
    words = [*SMALL, "--peer", "theirs=tests.bench.test_kernels:wrong", "--out", str(out)]
    assert cli.main(["bench", "ops", *words]) == 0
    shown = capsys.readouterr().out
    assert "not run: theirs at B1 T12 H4 D6 4x2: o is off by" in shown
    assert "times its floor" in shown
    results = json.loads(out.read_text())
    assert [row["pass"] for row in results["rows"]] == ["forward", "backward", "decode", "forward", "backward"]
    assert cli.main(["bench", "ops", "--read", str(out), "--figure", str(figure)]) == 2
    assert "hold no sweep" in capsys.readouterr().err
    for tokens in (512, 1024):
        row = results["rows"][0] | {"tokens": tokens, "sweep": True}
        results["rows"] += [row, row | {"pass": "backward", "tflops": row["tflops"] / 2}]
    out.write_text(json.dumps(results))
    assert cli.main(["bench", "ops", "--read", str(out), "--figure", str(figure)]) == 0
    assert "backward, 4 heads" in figure.read_text()


def test_what_kernels_alone_take_is_refused_elsewhere(capsys, tmp_path):
    other = tmp_path / "other.json"
    for text in ("{}", "[1]", "no json"):
        other.write_text(text)
        assert cli.main(["bench", "ops", "--read", str(other)]) == 2
        assert "--read" in capsys.readouterr().err
    assert cli.main(["bench", "ops", "--sweep"]) == 2
    assert "--sweep: takes a GPU" in capsys.readouterr().err
    assert cli.main(["bench", "ops", "--op", "scan", "--sweep"]) == 2
    assert "are simplicial's, not of scan" in capsys.readouterr().err


def interrupted(*tensors, **windows):
    raise KeyboardInterrupt


def test_a_run_that_is_ended_early_leaves_its_rows_beside_the_earlier_file(monkeypatch, tmp_path):
    out, partial = tmp_path / "kernels.json", tmp_path / "kernels.partial.json"
    monkeypatch.setattr("trivium.commands.kernels.bench_kernels", functools.partial(bench_kernels, matrix=64))
    monkeypatch.setattr("trivium.bench.kernels.Clock", functools.partial(Clock, seconds=0.01))
    words = ["bench", "ops", *SMALL, "--passes", "forward", "--backends", "torch", "--out", str(out), "--peer"]
    assert cli.main([*words, "same=trivium.ops:simplicial_attention"]) == 0
    whole = json.loads(out.read_text())
    assert [row["backend"] for row in whole["rows"]] == ["torch", "same"]
    assert (whole["not_timed"], partial.exists()) == ([], False)
    assert cli.main([*words, f"broken={__name__}:interrupted"]) != 0
    left = json.loads(partial.read_text())
    assert [row["backend"] for row in left["rows"]] == ["torch"]
    assert left["not_timed"] == ["B1 T12 H4 D6 4x2: forward, broken"]
    assert json.loads(out.read_text()) == whole
    assert left.keys() == whole.keys()
