import dataclasses

import pytest
import torch

from trivium.config import UserError
from trivium.model.base import ModelContext
from trivium.model.decoder import DecoderConfig
from trivium.model.sizing import describe, match

CONTEXT = ModelContext(vocab_size=14, max_length=13, digit_ids=tuple(range(10)))
BASE = DecoderConfig()
SIZES = describe(BASE, CONTEXT, 13)


@pytest.mark.parametrize("feedforward", ["gelu", "swiglu"])
@pytest.mark.parametrize("layers", ["attention*2", "attention + attention(window=3, qk_norm=true)", "attention*3"])
def test_width_and_heads_stay_and_sizes_match_within_a_percent(layers: str, feedforward: str):
    config = dataclasses.replace(BASE, layers=layers, feedforward=feedforward, ff_width=None)
    for wanted, key in ((BASE.num_params(CONTEXT), "parameters"), (SIZES["flops_per_token"], "flops_per_token")):
        sized = match(config, CONTEXT, length=13, **{key.removesuffix("_per_token"): wanted})
        assert dataclasses.replace(sized, ff_width=None) == config
        reached = describe(sized, CONTEXT, 13)[key]
        assert reached == pytest.approx(wanted, rel=0.01)
        for step in (-1, 1):
            neighbour = dataclasses.replace(sized, ff_width=sized.ff_width + step)
            assert abs(reached - wanted) <= abs(describe(neighbour, CONTEXT, 13)[key] - wanted)


def test_a_model_is_matched_to_its_own_size_by_its_own_width():
    assert match(BASE, CONTEXT, parameters=BASE.num_params(CONTEXT), length=13).ff_width == BASE.hidden_width


def test_a_target_below_the_smallest_model_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"cannot match 1,000 parameters within 1 %.*is [0-9,]+, even with ff_width 1$"):
        match(BASE, CONTEXT, parameters=1000, length=13)


def test_a_step_coarser_than_a_percent_is_refused_with_the_nearest():
    narrow = DecoderConfig(width=4, heads=2, layers="attention*30")
    between = match(narrow, CONTEXT, parameters=dataclasses.replace(narrow, ff_width=3).num_params(CONTEXT), length=13)
    target = (between.num_params(CONTEXT) + dataclasses.replace(between, ff_width=4).num_params(CONTEXT)) // 2
    with pytest.raises(UserError, match="with ff_width"):
        match(narrow, CONTEXT, parameters=target, length=13)


def test_exactly_one_target_is_given():
    for targets in ({}, {"parameters": 3, "flops": 3.0}):
        with pytest.raises(ValueError, match="exactly one"):
            match(BASE, CONTEXT, length=13, **targets)


def test_sizes_are_described():
    assert {
        "parameters": BASE.num_params(CONTEXT),
        "flops_per_token": BASE.flops_per_token(CONTEXT, 13),
        "state_bytes": BASE.state_bytes(CONTEXT, 13, torch.float32),
    } == SIZES
