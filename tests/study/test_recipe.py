import pytest

from trivium.config import UserError, config_hash, from_dict, to_dict
from trivium.model.prefix_scan import PrefixScanConfig
from trivium.study.recipe import CompareConfig, Recipe, load_recipe
from trivium.tasks.addition import AdditionConfig

TEXT = """\
task: {kind: addition, format: reversed, max_digits: 2}
model: {width: 16, heads: 2, positions: block}
train: {steps: 4, batch: 8, learning_rate: 3e-3}
compare:
  seeds: [0, 1]
  variants:
    attention: {model.layers: "attention*2"}
    local: {model.layers: "attention*1 + attention(window=2)*1"}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "my question.yaml"
    path.write_text(TEXT)
    return path


def compare_of(**changes):
    return from_dict(CompareConfig, {"variants": {"a": {}, "b": {}}, **changes}, "compare")


def test_a_recipe_takes_its_name_from_its_file(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.name == "my-question"
    assert recipe.folder_name == f"my-question-{config_hash(recipe)}"
    assert recipe.run.train.learning_rate == 3e-3
    assert recipe.compare is not None
    assert list(recipe.compare.variants) == ["attention", "local"]
    assert recipe.compare.baseline == "attention"


def test_a_recipe_survives_a_round_trip_through_plain_data(recipe_file):
    recipe = load_recipe(recipe_file)
    assert from_dict(Recipe, to_dict(recipe)) == recipe


def test_a_recipe_without_a_study_is_a_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 5}\n")
    recipe = load_recipe(path)
    assert recipe.compare is None
    assert recipe.run.train.steps == 5


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps: 4", "stesp: 4", ["train.stesp", "did you mean 'steps'"]),
        ("seeds: [0, 1]", "seed: [0, 1]", ["compare.seed", "did you mean 'seeds'"]),
        ("seeds: [0, 1]", "seeds: [0, 0]", ["compare.seeds", "twice"]),
        ("seeds: [0, 1]", "seeds: []", ["compare.seeds", "at least one"]),
        ("seeds: [0, 1]", "seeds: [0, -1]", ["compare.seeds", "from 0 on"]),
        ("seeds: [0, 1]", "match: size", ["compare.match", "parameters, flops"]),
        ("seeds: [0, 1]", "to: locla", ["compare.to", "did you mean 'local'"]),
        ("local:", "lo/cal:", ["compare.variants.lo/cal", "letters"]),
        ("seeds: [0, 1]", "thresholds: [90]", ["compare.thresholds", "up to 1"]),
        ("seeds: [0, 1]", "learning_rates: [1e-3, -1]", ["compare.learning_rates", "positive"]),
        ("steps: 4", "steps: many", ["train.steps", "a whole number"]),
        ("compare:", "compere:", ["compere", "did you mean 'compare'"]),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(recipe_file, old, new, words):
    assert old in TEXT
    recipe_file.write_text(TEXT.replace(old, new))
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file)
    message = str(error.value)
    assert message.startswith(f"{recipe_file}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_file_and_malformed_yaml_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: no such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("train: {steps: 1\ncompare: [")
    with pytest.raises(UserError, match=r"bad\.yaml:2: not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_overrides_reach_every_section_and_single_keys_of_a_variant(recipe_file):
    recipe = load_recipe(
        recipe_file,
        {
            "train.steps": 9,
            "compare.seeds": [4],
            "compare.variants.local.model.layers": "attention(window=3)*2",
            "compare.variants.extra": {"model.layers": "attention*2", "match": "flops"},
            "name": "other",
        },
    )
    assert recipe.compare is not None
    assert (recipe.train.steps, recipe.compare.seeds, recipe.name) == (9, (4,), "other")
    assert recipe.compare.variants["local"] == {"model.layers": "attention(window=3)*2"}
    assert list(recipe.compare.variants) == ["attention", "local", "extra"]
    assert recipe.train.batch == 8


def test_an_override_of_a_section_that_the_file_leaves_out_keeps_the_sections_kind(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {steps: 5}\n")
    recipe = load_recipe(path, {"task.max_digits": 2, "model.width": 32})
    assert recipe.task == AdditionConfig(max_digits=2)


def test_an_override_of_the_kind_drops_the_keys_of_the_other_kind(recipe_file):
    overrides = {"task.train": "train.jsonl", "task.kind": "jsonl"}
    with pytest.raises(UserError, match=r"train\.jsonl|test|validation"):
        load_recipe(recipe_file, overrides).task.build()


def test_another_kind_of_model_keeps_what_means_the_same_in_both(recipe_file):
    model = load_recipe(recipe_file, {"model.kind": "prefix_scan", "model.chunk": 4, "model.heads": 4}).model
    assert model == PrefixScanConfig(width=16, heads=4, chunk=4)
    assert load_recipe(recipe_file, {"model.kind": "decoder"}) == load_recipe(recipe_file)


def test_a_wrong_override_is_named(recipe_file):
    with pytest.raises(UserError, match=r"with the overrides train\.stesp: train\.stesp: unknown key"):
        load_recipe(recipe_file, {"train.stesp": 3})


def test_an_override_can_mend_the_file(recipe_file):
    recipe_file.write_text(TEXT.replace("steps: 4", "steps: -4"))
    assert load_recipe(recipe_file, {"train.steps": 4}).train.steps == 4


def test_tuning_seeds_are_not_reported():
    compare_of(seeds=[0], tuning_seeds=[0])  # no grid, so nothing is tuned
    with pytest.raises(UserError, match=r"compare\.tuning_seeds: \[0\] also stand in seeds"):
        compare_of(seeds=[0], tuning_seeds=[0], learning_rates=[1e-3, 3e-3])


def test_the_study_is_named_by_what_changes_its_results(recipe_file):
    name = load_recipe(recipe_file).folder_name
    assert load_recipe(recipe_file, {"compare.thresholds": [0.5], "train.threads": 1}).folder_name == name
    assert load_recipe(recipe_file, {"compare.seeds": [0]}).folder_name != name
