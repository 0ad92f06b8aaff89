import pytest
import torch

from trivium.bench.gates import WrongResult
from trivium.bench.linear import RecurrenceShape, bench_recurrence
from trivium.ops import dispatch
from trivium.ops.delta_rule.chunked import chunked
from trivium.registry import UserError

TINY = RecurrenceShape(batch=1, tokens=20, heads=2, head_width=4)


@pytest.mark.parametrize("operator", ["gated_linear_attention", "gated_delta_rule"])
def test_every_backend_is_timed_beside_the_reference(operator):
    threads = torch.get_num_threads()
    found = bench_recurrence(operator, [TINY], repeats=3, threads=1)
    assert found["operator"] == operator
    assert torch.get_num_threads() == threads
    assert {row["backend"] for row in found["rows"]} >= {"reference", "torch"}
    reference = found["rows"][0]
    assert (reference["shape"], reference["backend"]) == ("B1 T20 H2 K4", "reference")
    assert reference["times_as_fast"] == 1
    for row in found["rows"]:
        assert len(row["seconds"]) == 3
        assert min(row["seconds"]) <= row["forward_backward_seconds"] <= max(row["seconds"])


def test_a_wrong_backend_is_refused_not_timed(monkeypatch):
    def wrong(q, k, v, beta, log_decay, **options):
        o, state = chunked(q, k, v, beta, log_decay, **options)
        return o, state * 1.001

    monkeypatch.setitem(dispatch._registered["gated_delta_rule"], "torch", dispatch.Backend(lambda: wrong))
    with pytest.raises(WrongResult, match=r"backend torch: result 1 is off by .*; not timed"):
        bench_recurrence("gated_delta_rule", [TINY], ["torch"], repeats=1)


def test_a_missing_backend_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="no backend 'hopper' on this machine"):
        bench_recurrence("gated_delta_rule", [TINY], ["hopper"])
