"""Every recipe of the repository loads, its variants can be matched, and a small version of it trains."""

from pathlib import Path

import pytest

from trivium.study.recipe import load_recipe
from trivium.study.variants import expand
from trivium.train.loop import train

RECIPES = Path(__file__).parents[2] / "recipes"
# What makes a run of a second: one short problem length, a narrow model, two steps.
SMALL = {
    "model.width": 16,
    "model.heads": 2,
    "train.steps": 2,
    "train.batch": 8,
    "train.eval_every": 1,
    "train.eval_examples": 8,
    "train.warmup": 0,
    "train.precision": "float32",
    "train.threads": 1,
    "evaluate.examples": 4,
}
CHANGES = {
    "state_tracking_s5": {"train.batch": None, "train.batch_tokens": 72, "evaluate.lengths": [18, 34]},
    "state_tracking_s3": {"train.batch": None, "train.batch_tokens": 72, "evaluate.lengths": [18, 34]},
    "parity": {"train.batch": None, "train.batch_tokens": 80, "evaluate.lengths": [20, 50]},
    "mqar": {"task.vocabulary": 64, "evaluate.lengths": [64, 128]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_expands_to_matched_variants(name):
    variants = expand(load_recipe(RECIPES / f"{name}.yaml"))
    assert {"attention", "local", "simplicial", "attention_flops"} <= {variant.name for variant in variants}
    parameters = [variant.sizes["parameters"] for variant in variants if variant.match != "flops"]
    assert max(parameters) <= 1.01 * min(parameters)


@pytest.mark.parametrize("name", CHANGES)
def test_a_small_version_of_a_recipe_trains(name, tmp_path):
    recipe = load_recipe(RECIPES / f"{name}.yaml", SMALL | CHANGES[name])
    lengths = [str(length) for length in CHANGES[name]["evaluate.lengths"]]
    for variant in expand(recipe):
        if variant.name in ("attention", "simplicial"):
            result = train(variant.run(0), tmp_path / variant.name)
            assert result["step"] == 2
            assert list(result["evaluation"]["by_length"]) == lengths
