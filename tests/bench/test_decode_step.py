import pytest
import torch

from trivium.bench.decode_step import StepShape, bench_decode_steps
from trivium.mixers.base import MIXERS, MixerContext
from trivium.registry import UserError

TINY = StepShape(width=16, heads=2, batch=2, context=12)


def test_every_registered_mixer_has_a_row_with_the_flops_of_its_weights_and_of_its_state():
    results = bench_decode_steps(TINY, repeats=1, threads=1)
    rows = {row["mixer"]: row for row in results["rows"]}
    assert set(MIXERS.names()) <= rows.keys()
    assert rows["attention"]["weight_flops"] == 2 * 2 * 4 * 16 * 16
    assert rows["attention"]["state_flops"] == 2 * 4 * 16 * 12  # the last token reads twelve
    assert rows["gla"]["state_flops"] == 2 * 5 * 2 * 8 * 8
    for row in rows.values():
        assert row["ratio"] > 0
        assert row["predicted_milliseconds"] > 0


@torch.inference_mode()
def test_the_flops_of_weights_and_state_are_all_that_a_mixer_counts():
    context = MixerContext(width=16, heads=2, max_length=12)
    config = MIXERS.get("attention")()
    (row,) = bench_decode_steps(TINY, ["attention"], repeats=1)["rows"]
    last = 12 * config.flops_per_token(context, 12) - 11 * config.flops_per_token(context, 11)
    assert row["weight_flops"] + row["state_flops"] == pytest.approx(2 * last)


def test_a_pattern_of_several_layers_is_refused():
    with pytest.raises(UserError, match="name one layer at a time"):
        bench_decode_steps(TINY, ["gla*2"], repeats=1)
