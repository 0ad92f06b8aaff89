import json

import pytest
import torch

from trivium.bench import scan
from trivium.bench.gates import WrongResult
from trivium.bench.scan import ScanShape, bench_scan, counter_prefixes
from trivium.config import UserError

TINY = (ScanShape(8, chunks=5, chunk=2, batch=2, heads=2),)


def test_both_ways_are_timed_in_the_step_and_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scan, "SHAPES", TINY)
    monkeypatch.setattr(scan.bench_scan, "__defaults__", (TINY,))
    scan.main(["--repeats", "1", "--threads", "1", "--out", str(tmp_path / "results" / "scan.json")])
    results = json.loads((tmp_path / "results" / "scan.json").read_text())
    assert results["threads"] == 1
    (row,) = results["rows"]
    for what in ("step", "one by one", "scan"):
        assert row[what]["counter"]["median"] / row[what]["levels"]["median"] == row[what]["times_faster"] > 0
    assert "5 chunks of 2, width 8, batch 2: step " in capsys.readouterr().out


def test_a_model_one_by_one_that_disagrees_is_not_timed(monkeypatch):
    honest = scan._one_by_one
    monkeypatch.setattr(scan, "_one_by_one", lambda model, tokens: honest(model, tokens) * 1.01)
    with pytest.raises(WrongResult, match=r"differ by .* nothing was timed"):
        bench_scan(TINY, repeats=1)


def test_scans_that_disagree_are_not_timed(monkeypatch):
    monkeypatch.setitem(scan.SCANS, "counter", lambda *arguments: counter_prefixes(*arguments) * 1.01)
    with pytest.raises(WrongResult, match=r"differ by .* nothing was timed"):
        bench_scan(TINY, repeats=1)


def test_the_counter_gives_the_prefixes_of_the_scan():
    chunks = torch.randn(7, 2, 3, dtype=torch.float64)
    mine, theirs = (way(chunks, lambda a, b: 2 * a - b, torch.zeros(3)) for way in scan.SCANS.values())
    assert torch.equal(mine, theirs)


def test_chunks_of_which_no_two_are_combined_are_refused():
    with pytest.raises(UserError, match="chunks: expected 3 or more, got 2"):
        ScanShape(8, chunks=2)
