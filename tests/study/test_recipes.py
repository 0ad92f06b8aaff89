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


# Recipes of the arithmetic lab, and those that look closer at one mixer: what makes a run of a second, and the variant.
LAB = {
    "addition_length": (
        {"evaluate.lengths": [20, 22], "evaluate.pairs": [2, 22], "evaluate.pair_examples": 2},
        "coupled",
    ),
    "addition_tiny": ({"model.width": 8, "train.batch": 8, "evaluate.published": []}, "p528"),
    "addition_4digit": ({"train.batch": 16}, "whole"),
    "chain_of_thought": ({"train.steps": None, "train.generated_tokens": 900}, "column"),
    "chain_of_thought_multiplication": ({"train.steps": None, "train.generated_tokens": 900}, "chain"),
    "multiplication": ({}, "internalised"),
    "multiplication_cut": ({}, "internalised"),
    "multiplication_one_by_one": ({}, "internalised"),
    "mixers_addition": ({}, "gru"),
    "adder_base16": ({"model.preset": None, "model.layers": "attention*1"}, "two_tokens"),
    "adder_chain_small": (
        {"model.preset": None, "model.layers": "attention*1", "train.epochs": None, "task.train_examples": 100},
        "rollout",
    ),
    "state_tracking_s5_scan": (
        {"train.batch": None, "train.batch_tokens": 72, "evaluate.lengths": [18, 34]},
        "prefix_scan",
    ),
    "state_tracking_s5_normed": (
        {"train.batch": None, "train.batch_tokens": 72, "evaluate.lengths": [18, 34]},
        "prefix_scan_normed",
    ),
    "state_tracking_s3_start": (
        {"train.batch": None, "train.batch_tokens": 72, "evaluate.lengths": [18, 34]},
        "deltaproduct",
    ),
}


def test_every_recipe_is_tried_here():
    # The larger presets differ from the small one in nothing else; the hybrids have a test file of their own.
    others = {"quickstart", "adder_chain_medium", "adder_chain_large", "hybrid_gpt2", "hybrid_gsm8k"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*CHANGES, *LAB, *others}


@pytest.mark.parametrize("name", ["adder_chain_medium", "adder_chain_large", *LAB])
def test_a_recipe_of_the_lab_expands_to_matched_variants(name):
    variants = expand(load_recipe(RECIPES / f"{name}.yaml"))
    parameters = [variant.sizes["parameters"] for variant in variants if variant.match not in ("flops", "none")]
    assert max(parameters, default=1) <= 1.01 * min(parameters, default=1)


@pytest.mark.parametrize("name", LAB)
def test_a_small_version_of_a_recipe_of_the_lab_trains(name, tmp_path):
    changes, chosen = LAB[name]
    recipe = load_recipe(RECIPES / f"{name}.yaml", SMALL | {"train.learning_rate": 1e-3} | changes)
    variant = next(variant for variant in expand(recipe) if variant.name == chosen)
    assert train(variant.run(0), tmp_path)["evaluation"]["exact_match"]["n"] == 4


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
