from dataclasses import replace

import pytest

from trivium.config import UserError, from_dict
from trivium.model.prefix_scan import PrefixScanConfig
from trivium.study.recipe import Recipe
from trivium.study.variants import expand, nearly_equal

FOUR = {
    "attention": {"model.layers": "attention*2"},
    "local": {"model.layers": "attention*1 + attention(window=6)*1"},
    "simplicial": {"model.layers": "attention*1 + simplicial(window1=6, window2=3)*1"},
    "attention_flops": {"model.layers": "attention*2", "match": "flops", "to": "simplicial"},
}


def recipe_of(variants, **compare):
    return from_dict(
        Recipe,
        {
            "task": {"kind": "addition", "format": "reversed", "max_digits": 3},
            "model": {"width": 64, "heads": 4, "positions": "block"},
            "train": {"steps": 10},
            "compare": {"variants": variants, **compare},
        },
    )


def test_variants_match_the_reference_within_one_percent():
    variants = {variant.name: variant for variant in expand(recipe_of(FOUR))}
    assert list(variants) == list(FOUR)
    reference = variants["attention"].sizes["parameters"]
    for name in ("local", "simplicial"):
        assert variants[name].sizes["parameters"] == pytest.approx(reference, rel=0.01)
        assert variants[name].match == "parameters"
    flops = variants["simplicial"].sizes["flops_per_token"]
    assert variants["attention_flops"].sizes["flops_per_token"] == pytest.approx(flops, rel=0.01)
    assert (variants["attention_flops"].match, variants["attention_flops"].to) == ("flops", "simplicial")
    assert variants["attention"].to is None


def test_flops_can_be_what_the_whole_study_matches():
    variants = expand(recipe_of(dict(list(FOUR.items())[:3]), match="flops", to="simplicial"))
    reference = next(variant for variant in variants if variant.name == "simplicial")
    for variant in variants:
        assert variant.sizes["flops_per_token"] == pytest.approx(reference.sizes["flops_per_token"], rel=0.01)
    assert reference.match is None


def test_variants_share_all_but_what_they_change():
    variants = expand(recipe_of(FOUR))
    assert len({variant.config.train for variant in variants}) == 1
    assert len({variant.config.task for variant in variants}) == 1
    models = [replace(variant.config.model, layers="attention*2", ff_width=None) for variant in variants]
    assert all(model == models[0] for model in models)


def test_a_variant_is_named_by_the_mixer_that_sets_it_apart():
    assert [variant.mixer for variant in expand(recipe_of(FOUR))] == ["attention", "local", "simplicial", "attention"]


def test_a_window_that_covers_the_whole_sequence_is_no_control():
    covering = {**FOUR, "local": {"model.layers": "attention*1 + attention(window=13)*1"}}
    with pytest.raises(UserError, match=r"'attention' and 'local' are the same at this task's 13 tokens"):
        expand(recipe_of(covering))


def test_a_control_that_is_nearly_another_variant_is_told_with_how_near(caplog):
    (note,) = nearly_equal(expand(recipe_of(FOUR)))
    assert note == (
        "attention_flops is attention but for the width of its feed-forward: +1.0 % FLOPs per token, +1.0 % "
        "parameters. As a control it says little that attention does not."
    )
    costly = {**FOUR, "simplicial": {"model.layers": "attention*1 + simplicial(window1=13, window2=13)*1"}}
    assert nearly_equal(expand(recipe_of(costly))) == []


def test_two_names_for_one_model_are_refused():
    with pytest.raises(UserError, match="'attention' and 'again' are the same"):
        expand(recipe_of({"attention": FOUR["attention"], "again": {"model.layers": "attention*1 + attention*1"}}))


def test_the_same_model_with_another_loss_is_another_variant():
    variants = expand(recipe_of({"answer": {}, "prompt": {"train.prompt_loss": True}}))
    assert [variant.config.train.prompt_loss for variant in variants] == [False, True]


def test_the_same_model_with_another_objective_is_another_variant():
    objectives = {
        "next": {},
        "two": {"train.objective": "label_shift", "train.shift": 1},
        "rolled": {"train.objective": "rollout", "train.rollout.temperature": 0.5},
    }
    variants = expand(recipe_of(objectives))
    assert [variant.config.train.objective for variant in variants] == ["next_token", "label_shift", "rollout"]
    assert variants[2].config.train.rollout.temperature == 0.5


def test_masking_the_chain_of_a_task_that_has_none_is_no_variant():
    recipe = recipe_of({"chain": {}, "masked": {"train.chain_loss": False}})
    with pytest.raises(UserError, match="'chain' and 'masked' are the same"):
        expand(recipe)
    assert len(expand(replace(recipe, task=replace(recipe.task, format="column")))) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.steps": 20}, "compare.variants.local.train.steps: a variant may not change it"),
        ({"train.learning_rate": 0.1}, "compare.learning_rates"),
        ({"task.max_digits": 2}, "compare.variants.local.task.max_digits: a variant may not"),
        ({"model.ff_width": 99}, "compare.variants.local.model.ff_width: it is solved"),
        ({"model.preset": "small"}, "compare.variants.local.model.preset"),
        ({"model.layesr": "attention*2"}, "compare.variants.local.model.layesr: unknown key; did you mean 'layers'"),
        ({"model.layers": "attenton*2"}, "compare.variants.local.model.layers: unknown mixer 'attenton'"),
        ({"model.heads": 5}, "compare.variants.local.model.heads: 5 heads do not divide"),
        ({"match": "size"}, "compare.variants.local.match: 'size' is not allowed"),
        ({"to": "atention"}, "compare.variants.local.to: no variant 'atention'; did you mean 'attention'"),
        ({"to": "local"}, "compare.variants.local.to: a variant cannot be matched to itself"),
        ({"model.layers": "attention*9"}, "compare.variants.local: ff_width: cannot match"),
    ],
)
def test_a_variant_that_cannot_be_is_named_with_its_key(change, words):
    with pytest.raises(UserError) as error:
        expand(recipe_of({"attention": FOUR["attention"], "local": {**FOUR["local"], **change}}))
    assert words in str(error.value)


def test_variants_matched_to_one_another_in_a_circle_are_refused():
    with pytest.raises(UserError, match="a, b are matched to one another in a circle"):
        expand(recipe_of({"a": {"to": "b"}, "b": FOUR["local"]}))


def test_a_single_learning_rate_of_the_grid_is_the_one_that_all_use():
    variants = expand(recipe_of(FOUR, learning_rates=[1e-4]))
    assert {variant.config.train.learning_rate for variant in variants} == {1e-4}


def test_a_recipe_without_a_study_is_refused():
    with pytest.raises(UserError, match="compare: the recipe has no such section"):
        expand(Recipe())


def test_runs_of_a_variant_have_folders_of_their_own():
    variant = expand(recipe_of(FOUR))[0]
    runs = [variant.run(0), variant.run(1), variant.run(0, 1e-4)]
    names = [variant.folder_name(run) for run in runs]
    assert len(set(names)) == 3
    assert names[0].startswith("attention-s0-")
    assert names[1].startswith("attention-s1-")


@pytest.mark.parametrize("how", ["parameters", "flops"])
def test_a_variant_may_be_another_kind_of_model_of_the_same_width_matched_like_the_rest(how):
    recipe = recipe_of({"attention": {}, "scan": {"model.kind": "prefix_scan", "model.chunk": 4}}, match=how)
    recipe = replace(recipe, model=replace(recipe.model, width=48, heads=3, norm="rmsnorm"))
    attention, scan = expand(recipe)
    assert isinstance(scan.config.model, PrefixScanConfig)
    assert (scan.config.model.width, scan.config.model.heads, scan.config.model.norm) == (48, 3, "rmsnorm")
    assert (scan.config.model.chunk, scan.config.model.layers) == (4, PrefixScanConfig().layers)
    assert scan.mixer == "prefix_scan"
    key = "flops_per_token" if how == "flops" else "parameters"
    assert scan.sizes[key] == pytest.approx(attention.sizes[key], rel=0.01)


def test_a_kind_that_is_unknown_names_the_known_ones():
    with pytest.raises(UserError, match=r"unknown model 'prefix_scam'; did you mean 'prefix_scan'"):
        expand(recipe_of({"attention": {}, "scan": {"model.kind": "prefix_scam"}}))


def test_variants_may_write_the_same_problems_in_other_ways():
    formats = {"plain": {"task.format": "plain"}, "column": {"task.format": "column"}}
    plain, column = expand(recipe_of(formats))
    assert (plain.config.task.format, column.config.task.format) == ("plain", "column")
    assert (plain.length, column.length) == (13, column.config.task.build().max_length)
    assert column.sizes["parameters"] == pytest.approx(plain.sizes["parameters"], rel=0.01)
    assert nearly_equal([plain, column]) == []


@pytest.mark.parametrize("key", ["task.max_digits", "task.kind", "task.stratify"])
def test_variants_may_not_have_other_problems(key):
    with pytest.raises(UserError, match=rf"{key}: a variant may not change it, .* task.format, task.zero_pad"):
        expand(recipe_of({"attention": {}, "other": {key: 1}}))


def test_sizes_may_be_what_is_compared():
    sizes = {"small": {"model.ff_width": 8}, "large": {"model.ff_width": 200}}
    small, large = expand(recipe_of(sizes, match="none"))
    assert (small.config.model.ff_width, large.config.model.ff_width) == (8, 200)
    assert large.sizes["parameters"] > 2 * small.sizes["parameters"]
    assert (small.match, large.match, large.to) == ("none", "none", None)
    with pytest.raises(UserError, match="'small' and 'again' are the same"):
        expand(recipe_of({**sizes, "again": {"model.ff_width": 8}}, match="none"))
