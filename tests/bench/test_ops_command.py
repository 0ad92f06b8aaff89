"""`trivium bench ops`: one row a backend, against the reference."""

import json
import subprocess

import pytest

from trivium import cli
from trivium.bench import ops
from trivium.bench.gates import WrongResult
from trivium.registry import UserError

SMALL = ["--batch", "1", "--tokens", "12", "--head-width", "6", "--window1", "4", "--window2", "2", "--repeats", "1"]


def test_each_backend_has_a_row_beside_the_reference(tmp_path, capsys):
    out = tmp_path / "results" / "ops.json"
    assert cli.main(["bench", "ops", *SMALL, "--json", "--out", str(out), "--threads", "1"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads(out.read_text())
    rows = {row["backend"]: row for row in results["rows"]}
    assert {"reference", "torch"} <= rows.keys()
    assert rows["reference"]["times_as_fast"] == 1
    assert rows["torch"]["tokens"] == 12


def test_a_table_is_printed_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["bench", "ops", *SMALL, "--backends", "reference"]) == 0
    out, err = capsys.readouterr()
    assert "B1 T12 H4 D6 4x2" in out
    assert "reference" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "--tokens: expected 1 or more"),
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
