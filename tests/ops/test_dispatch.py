import logging
from typing import Any

import pytest
import torch

from trivium.ops import dispatch, simplicial_attention
from trivium.ops.dispatch import Backend
from trivium.registry import UserError


@pytest.fixture(autouse=True)
def _own_records(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.operators()
    monkeypatch.setattr(dispatch, "_registered", {name: dict(found) for name, found in dispatch._registered.items()})
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_record", {})
    monkeypatch.setattr(dispatch, "_taken", {})


def compute(**options: Any) -> torch.Tensor:
    tensors = [torch.ones(1, 2, 1, 3) for _ in range(5)]
    return simplicial_attention(*tensors, window1=2, window2=2, **options)


def test_auto_takes_the_torch_backend_on_a_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="trivium"):
        compute()
        compute(backend="auto")
    assert [record.message for record in caplog.records] == [
        "operator simplicial on cpu: backend torch (plain PyTorch, windowed, runs on cpu)"
    ]
    assert dispatch.chosen() == {"simplicial": {"backend": "torch", "reason": "plain PyTorch, windowed, runs on cpu"}}


def test_a_backend_asked_for_by_name_is_recorded_as_that():
    compute(backend="reference")
    assert dispatch.chosen() == {"simplicial": {"backend": "reference", "reason": "asked for by name"}}


def test_each_run_of_a_process_records_its_own_choices():
    compute()
    compute(backend="reference")
    assert dispatch.taken() == {"simplicial": ["torch", "reference"]}
    dispatch.forget()
    assert dispatch.chosen() == dispatch.taken() == {}
    compute()  # decided before, and still recorded
    assert dispatch.chosen()["simplicial"]["backend"] == "torch"


def test_a_new_backend_is_a_few_lines_and_auto_takes_it_where_it_suits():
    backend = Backend(lambda: lambda q, *rest, **options: q + 41, suits=lambda device: f"a kernel for {device}")
    dispatch.register("simplicial", "triton", backend)
    assert compute().eq(42).all()
    assert compute(backend="torch").eq(1).all()
    assert dispatch.choose("simplicial", "auto", "cpu") == "triton"


def test_a_backend_that_is_slower_for_a_call_is_left_by_auto_and_taken_by_name():
    backend = Backend(
        lambda: lambda q, *rest, **options: q + 41,
        suits=lambda device: "a kernel",
        slower=lambda facts: "narrow heads" if facts.get("width") == 3 else None,
    )
    dispatch.register("simplicial", "triton", backend)
    assert dispatch.choose("simplicial", "auto", "cpu") == "triton"
    compute()
    assert dispatch.chosen()["simplicial"]["reason"].endswith("; triton is slower: narrow heads")
    assert compute(backend="triton").eq(42).all()


def test_a_faster_backend_that_is_missing_is_announced_when_auto_falls_back(caplog: pytest.LogCaptureFixture):
    missing = Backend(lambda: None, missing=lambda: "triton is not installed", suits=lambda device: "fast")  # pyright: ignore
    dispatch.register("simplicial", "triton", missing)
    with caplog.at_level(logging.INFO, logger="trivium"):
        assert dispatch.choose("simplicial", "auto", "cuda") == "torch"
    assert "triton is missing: triton is not installed" in caplog.text
    assert "triton is missing: triton is not installed" in dispatch.chosen()["simplicial"]["reason"]
    found = dispatch.backends("simplicial")
    assert (found["reference"], found["torch"], found["triton"]) == (None, None, "triton is not installed")


def test_a_missing_backend_asked_for_by_name_is_an_error_and_never_a_detour():
    with pytest.raises(UserError, match=r"no backend 'fla' on this machine; .*allowed: auto, reference, torch"):
        compute(backend="fla")
    missing = Backend(lambda: None, missing=lambda: "no GPU")  # pyright: ignore
    dispatch.register("simplicial", "fla", missing)
    with pytest.raises(UserError, match=r"'fla' is missing: no GPU; allowed: auto, reference, torch"):
        compute(backend="fla")
    assert dispatch.chosen() == {}


def test_an_unknown_operator_or_backend_name_is_refused():
    with pytest.raises(UserError, match="unknown operator 'simplical'; did you mean 'simplicial'"):
        dispatch.choose("simplical", "auto", "cpu")
    with pytest.raises(ValueError, match="allowed: reference, torch, native, triton, hopper, fla"):
        dispatch.register("simplicial", "cuda", Backend(lambda: compute))


def test_every_operator_has_a_reference_and_runs_on_a_cpu():
    assert {"attention", "simplicial"} <= set(dispatch.operators())
    for operator in dispatch.operators():
        assert dispatch.backends(operator)["reference"] is None
        assert dispatch.choose(operator, "auto", "cpu") in dispatch.backends(operator)


def test_the_operator_is_importable_from_the_room_and_nothing_else_appears_there():
    import trivium.ops

    assert trivium.ops.simplicial_attention is simplicial_attention
    with pytest.raises(AttributeError, match="no attribute 'quadratic'"):
        trivium.ops.__getattr__("quadratic")
