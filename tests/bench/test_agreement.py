"""Backends of the recurrences beside the float64 recurrence: what agrees, what is off, what cannot be asked for."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from trivium.bench import agreement
from trivium.bench.agreement import OPERATORS, Case, draw, main
from trivium.ops import dispatch

every_operator = pytest.mark.parametrize("operator", list(OPERATORS))


@every_operator
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_chunked_form_agrees_in_output_state_and_every_gradient(operator: str, dtype: str, packed: bool):
    row = Case(operator, 70, dtype, packed).compare("torch", "cpu")
    assert row["agrees"]
    assert row["gradients"] == "compared"
    gradients = {f"gradient of {name}" for name in draw(operator, 1)}
    assert set(row["distances"]) == {"output", "state", "output alone", "state alone"} | gradients


def test_a_document_changes_what_is_compared():
    found = [Case("gated_delta_rule", 70, "float32", packed).compare("torch", "cpu") for packed in (False, True)]
    assert found[0]["distances"] != found[1]["distances"]


@every_operator
def test_a_wrong_backend_is_off(operator: str, monkeypatch: pytest.MonkeyPatch):
    right = OPERATORS[operator]

    def wrong(*, backend: str, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, state = right(**arguments, backend=backend)
        return (o, state) if backend == "reference" else (o, state * 1.001)

    monkeypatch.setitem(OPERATORS, operator, wrong)
    row = Case(operator, 5, "float32", False).compare("torch", "cpu")
    assert not row["agrees"]
    assert row["distances"]["state"] == pytest.approx(1e-3, rel=0.01)
    assert row["distances"]["output"] < 1e-6


def test_a_backend_that_gives_no_number_is_off(monkeypatch: pytest.MonkeyPatch):
    right = OPERATORS["gated_delta_rule"]

    def wrong(*, backend: str, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, state = right(**arguments, backend=backend)
        return (o, state) if backend == "reference" else (o, state * torch.nan)

    monkeypatch.setitem(OPERATORS, "gated_delta_rule", wrong)
    row = Case("gated_delta_rule", 5, "float32", False).compare("torch", "cpu")
    assert not row["agrees"]
    assert "OFF, state by nan" in agreement.told(row)


def test_what_a_kernel_raises_is_told_in_its_row(monkeypatch: pytest.MonkeyPatch):
    def broken(**_: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(OPERATORS, "gated_delta_rule", broken)
    row = Case("gated_delta_rule", 5, "float32", False).compare("torch", "cpu")
    assert (row["agrees"], row["error"]) == (False, "RuntimeError: no such instruction")


def test_a_missing_backend_ends_with_2_and_the_reason(capsys: pytest.CaptureFixture[str]):
    if dispatch.backends("gated_delta_rule")["fla"] is None:
        pytest.skip("flash-linear-attention is installed and sees a device")
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu"])
    assert ended.value.code == 2
    assert "flash-linear-attention" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_writes_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agreement, "ProcessPoolExecutor", _Here)
    out = tmp_path / "found.json"
    sizes = ["--tokens", "3", "--dtypes", "float32"]
    assert main(["--backend", "torch", "--device", "cpu", *sizes, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    cases = {(row["operator"], row["tokens"], row["packed"]) for row in found["rows"]}
    assert cases == {(operator, 3, packed) for operator in OPERATORS for packed in (False, True)}
    assert found["environment"]["command"].startswith("python -m trivium.bench.agreement --backend torch")


def test_a_write_that_fails_leaves_the_results_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agreement, "ProcessPoolExecutor", _Here)
    out = tmp_path / "found.json"
    out.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    case = ["--op", "gated_delta_rule", "--tokens", "3", "--dtypes", "float32", "--packed", "no"]
    with pytest.raises(OSError, match="No space left"):
        main(["--backend", "torch", "--device", "cpu", *case, "--out", str(out)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("found.json", "before")]


class _Here:
    """A pool that works where it is: starting processes would take longer than all else."""

    def __init__(self, *_: Any, **__: Any):
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Any:
        return self.pool.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.pool.__exit__(*error)


def test_an_untuned_kernel_has_one_configuration_of_most_warps(monkeypatch: pytest.MonkeyPatch):
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    taken = []
    monkeypatch.setattr(
        autotuner.Autotuner, "__init__", lambda self, fn, names, configs, *rest, **more: taken.append(configs)
    )
    agreement.one_configuration()
    configs = [autotuner.Config({}, num_warps=warps, num_stages=stages) for warps in (2, 8, 4) for stages in (2, 3)]
    for given in (configs, [], None):
        autotuner.Autotuner(None, [], given, [], None, None)
    assert taken == [[configs[2]], [], []]
