"""What `bench_simplicial` promises: right results only, each beside the reference, with honest gaps."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from trivium.bench import ops
from trivium.bench.gates import WrongResult
from trivium.bench.ops import SimplicialShape, bench_simplicial
from trivium.ops import dispatch
from trivium.ops.simplicial.windowed import windowed
from trivium.registry import UserError

SHAPE = SimplicialShape(batch=2, tokens=24, heads=4, kv_heads=2, head_width=4, window1=6, window2=3)


@pytest.fixture
def forked(warm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each measurement have its own process without the seconds that a fresh one needs to import torch."""
    code = "import runpy, sys; runpy.run_module('trivium.bench.ops', run_name='__main__')"

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert (command[:3], options) == (
            [sys.executable, "-m", "trivium.bench.ops"],
            {"capture_output": True, "text": True},
        )
        process = warm.start(code, *command[3:], environment=env)
        return subprocess.CompletedProcess(command, process.wait(), process.out, process.err)

    monkeypatch.setattr(ops.subprocess, "run", run)


def test_each_backend_stands_beside_the_reference_with_time_and_memory(forked: None):
    lines: list[str] = []
    results = bench_simplicial([SHAPE], ["torch"], repeats=2, threads=1, on_progress=lines.append)
    reference, torch_row = results["rows"]
    assert (reference["backend"], torch_row["backend"]) == ("reference", "torch")
    assert (reference["times_as_fast"], reference["share_of_memory"]) == (1, 1)
    seconds = torch_row["forward_backward_seconds"]
    assert torch_row["times_as_fast"] == pytest.approx(reference["forward_backward_seconds"] / seconds)
    assert torch_row["tflops"] == pytest.approx(SHAPE.flops() / seconds / 1e12)
    assert len(torch_row["seconds"]) == 2
    assert lines == ["B2 T24 H4/2 D4 6x3: reference", "B2 T24 H4/2 D4 6x3: torch"]


def test_where_the_reference_does_not_fit_it_checks_fewer_tokens_and_its_row_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "_available_bytes", lambda: SHAPE.reference_bytes(12) * 2)
    monkeypatch.setattr(ops, "_in_a_process", ops._measure)
    reference, torch_row = bench_simplicial([SHAPE], ["torch"], repeats=1)["rows"]
    assert reference["not_run"].startswith("needs about")
    assert reference["checked_tokens"] == torch_row["checked_tokens"] == 12
    assert torch_row["forward_backward_seconds"] > 0
    assert "times_as_fast" not in torch_row


def test_a_wrong_result_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def off_by_one(*tensors: Any, window1: int, **options: Any) -> Any:
        return windowed(*tensors, window1=window1 + 1, **options)

    dispatch.operators()
    monkeypatch.setitem(dispatch._registered["simplicial"], "triton", dispatch.Backend(lambda: off_by_one))
    monkeypatch.setattr(dispatch, "_choices", {})
    job = {"shape": asdict(SHAPE), "checked": 24, "threads": torch.get_num_threads(), "device": "cpu", "repeats": 1}
    job |= {"form": "trilinear", "expected": str(tmp_path / "reference.safetensors")}
    assert ops._measure(job | {"backend": "reference"})["peak_bytes"] >= 0
    assert ops._measure(job | {"backend": "torch"})["seconds"]
    with pytest.raises(WrongResult, match=r"backend triton: o is off by .*; not timed"):
        ops._measure(job | {"backend": "triton"})


def test_a_missing_backend_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="no backend 'fla' on this machine"):
        bench_simplicial([SHAPE], ["torch", "fla"], on_progress=lambda line: pytest.fail(line))


def test_flops_are_four_a_channel_of_each_allowed_triple_and_two_and_a_half_times_that_backward():
    triples = sum(min(i, 6) * min(i, 3) for i in range(1, 25))
    assert SHAPE.flops() == 3.5 * 4 * 4 * 4 * 2 * triples
