"""What `bench_kernels` promises: right results only, each beside the chip's own rates; wrong peers are not timed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trivium.bench import kernels
from trivium.bench.gates import WrongResult
from trivium.bench.kernels import DECODED, SWEEP, TARGETS, bench_kernels, load_peer
from trivium.bench.ops import SimplicialShape
from trivium.ops import dispatch, simplicial_attention
from trivium.ops.simplicial.windowed import windowed
from trivium.registry import UserError

SHAPE = SimplicialShape(batch=2, tokens=40, heads=4, kv_heads=2, head_width=4, window1=12, window2=5)


def bench(backends: list[str], **options: Any) -> dict[str, Any]:
    return bench_kernels([SHAPE], backends, decoded=[SHAPE], device="cpu", matrix=64, **options)


def wrong(q: Tensor, *rest: Tensor, **windows: int) -> Tensor:
    return q * 1


def failing(*tensors: Tensor, **windows: int) -> Tensor:
    raise NotImplementedError("needs another chip\nand more")


def test_each_pass_has_its_rate_beside_the_product_of_the_same_run():
    lines: list[str] = []
    results = bench(["torch"], on_progress=lines.append)
    forward, backward, decode = results["rows"]
    triples = sum(min(i, 12) * min(i, 5) for i in range(1, 41))
    for row, flops in ((forward, 4 * 4 * 8 * triples), (backward, 10 * 4 * 8 * triples), (decode, 4 * 4 * 8 * 60)):
        assert row["tflops"] == pytest.approx(flops / row["seconds"] / 1e12)
        assert row["share"] == pytest.approx(row["tflops"] / results["matmul_tflops"])
        assert row["relative_error"] < 1e-5
    assert lines[0] == "B2 T40 H4/2 D4 12x5: forward, torch"
    moved = 4 * (2 * 2 * 2 * (12 + 5) * 4 + 2 * 2 * 4 * 4)
    least = max(moved / results["copy_bytes_per_second"], 4 * 4 * 8 * 60 / results["matmul_tflops"] / 1e12)
    assert decode["floor_seconds"] == pytest.approx(least)
    assert decode["times_floor"] == pytest.approx(decode["seconds"] / least)


@pytest.mark.parametrize("backward_alone", [False, True])
def test_a_wrong_backend_is_refused_and_nothing_of_it_is_timed(monkeypatch: pytest.MonkeyPatch, backward_alone: bool):
    def off_by_one(*tensors: Any, window1: int, **options: Any) -> Any:
        o = windowed(*tensors, window1=window1 + (not backward_alone), **options)
        return o + (tensors[1] - tensors[1].detach()).sum() if backward_alone else o

    dispatch.operators()
    monkeypatch.setitem(dispatch._registered["simplicial"], "triton", dispatch.Backend(lambda: off_by_one))
    monkeypatch.setattr(dispatch, "_choices", {})
    what = "dk1" if backward_alone else "o"
    with pytest.raises(WrongResult, match=f"triton at .*: {what} is off by .*; not timed"):
        bench(["triton"], passes=["backward" if backward_alone else "forward"])


def test_a_result_that_is_wrong_only_far_along_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "CHECKED_TOKENS", 20)

    def overflows(*tensors: Any, **options: Any) -> Any:
        o = windowed(*tensors, **options)
        return torch.cat((o[:, :30], 0 * o[:, 30:]), dim=1)

    dispatch.operators()
    monkeypatch.setitem(dispatch._registered["simplicial"], "triton", dispatch.Backend(lambda: overflows))
    monkeypatch.setattr(dispatch, "_choices", {})
    assert bench(["triton"], passes=["backward"])["rows"][0]["seconds"] > 0
    with pytest.raises(WrongResult, match="o is off"):
        bench(["triton"], passes=["forward"])


def test_peers_come_last_and_a_wrong_or_failing_one_is_told_and_not_timed():
    def right(*tensors: Tensor, **windows: int) -> Tensor:
        return simplicial_attention(*tensors, backend="torch", **windows)  # pyright: ignore[reportArgumentType]

    peers = {"right": right, "wrong": wrong, "failing": failing}
    rows = bench(["torch"], peers=peers, passes=["forward", "decode"], sweep=[SHAPE])["rows"]
    assert [row.get("sweep", False) for row in rows] == [False, False, True, False, False, False]
    del rows[2]
    assert [(row["backend"], row["pass"], row["peer"]) for row in rows] == [
        ("torch", "forward", False),
        ("torch", "decode", False),
        ("right", "forward", True),
        ("wrong", "forward", True),
        ("failing", "forward", True),
    ]
    assert rows[2]["seconds"] > 0
    assert "wrong at B2 T40 H4/2 D4 12x5: o is off by" in rows[3]["not_run"]
    assert rows[4]["not_run"] == "needs another chip"


def test_what_a_backend_refuses_by_name_is_a_row_that_says_so():
    (row,) = bench_kernels([SHAPE], ["torch"], form="trilinear", device="cpu", matrix=64, passes=["forward"], peers={})[
        "rows"
    ]
    assert "not_run" not in row
    with pytest.raises(UserError, match="factorized has no kernel"):
        bench(["torch"], form="factorized")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch.add", "is not NAME=module:function"),
        ("a=torch", "is not NAME=module:function"),
        ("a=no_such_module:f", "No module named 'no_such_module'"),
        ("a=torch:no_such_function", "no_such_function"),
    ],
)
def test_a_peer_that_cannot_be_had_is_refused_with_the_reason(text: str, message: str):
    with pytest.raises(UserError, match=message):
        load_peer(text)


def test_a_peer_is_a_function_by_its_path():
    assert load_peer(f"mine={__name__}:wrong") == ("mine", wrong)


def test_the_shapes_are_those_that_public_kernels_were_measured_at():
    assert "B4 T4096 H64/1 D128 512x32" in {shape.name for shape in TARGETS}
    assert DECODED[0].name == "B64 T1024 H64/1 D128 512x32"
    assert {shape.heads for shape in SWEEP} == {8, 32, 128}
