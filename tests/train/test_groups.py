"""Groups of parameters: which train, from when on and at which rate; a run with them continues exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny import tiny_config
from trivium.config import UserError, from_dict
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.ops import dispatch
from trivium.tasks.addition import AdditionConfig
from trivium.train.checkpoint import list_checkpoints, read_checkpoint
from trivium.train.config import GroupConfig, RunConfig, TrainConfig
from trivium.train.groups import grouped, num_weights, owners, set_training
from trivium.train.loop import train
from trivium.train.optim import build_optimizer, set_learning_rates
from trivium.train.prepare import prepare

NAMES = ["embedding.weight", "blocks.0.norm1.weight", "blocks.0.mixer.qkv.weight", "blocks.11.norm1.weight"]


def model() -> Any:
    torch.manual_seed(0)
    config = DecoderConfig(width=16, heads=2, layers="attention*3")
    return config.build(model_context(AdditionConfig(max_digits=2).build(), config))


def groups(given: dict[str, Any], **options: Any) -> TrainConfig:
    return from_dict(TrainConfig, {"groups": given, **options})


def test_the_first_pattern_that_fits_owns_a_name():
    given = {"blocks.*.mixer.*": GroupConfig(), "blocks.[0-3].*": GroupConfig()}
    found = owners(NAMES, given)
    assert list(found.values()) == [None, "blocks.[0-3].*", "blocks.*.mixer.*", None]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blokcs.*", r"'blokcs.\*' fits no parameter; their names are embedding.weight, blocks.0.\*, blocks.11.\*"),
        ("blocks.0.mixer.*", r"every parameter that it fits belongs to a pattern before it"),
    ],
)
def test_a_pattern_that_counts_for_nothing_is_refused(pattern: str, message: str):
    with pytest.raises(UserError, match=message):
        owners(NAMES, {"blocks.0.*": GroupConfig(), pattern: GroupConfig()})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": {"learning_rate": 0}}, r"groups\.a\.learning_rate: expected a number above 0, got 0"),
        ({"a": {"freeze": True, "learning_rate": 1e-3}}, "freeze: true leaves nothing"),
        ({"a": {"begins_at": -1}}, r"groups\.a\.begins_at: expected 0 or more"),
        ({"a": {"rate": 1}}, r"groups\.a\.rate: unknown key"),
    ],
)
def test_a_group_with_a_wrong_value_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        groups(given)
    with pytest.raises(UserError, match="below min_learning_rate"):
        groups({"a": {"learning_rate": 1e-5}}, min_learning_rate=1e-4)


def test_a_wrong_pattern_and_a_model_that_never_begins_end_before_a_folder_is_made(tmp_path: Path):
    with pytest.raises(UserError, match="fits no parameter"):
        prepare(tiny_config(groups={"blocks.7.*": {"freeze": True}}))
    with pytest.raises(UserError, match="no parameter trains in the first step"):
        train(tiny_config(groups={"*": {"begins_at": 2}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_group_has_its_own_rate_decay_and_shared_schedule():
    config = groups(
        {"embedding.*": {"learning_rate": 1e-4}, "blocks.1.*": {"learning_rate": 2e-3, "weight_decay": 0.5}},
        learning_rate=1e-2,
        min_learning_rate=1e-6,
        warmup=4,
        schedule="linear",
    )
    made = model()
    optimizer = build_optimizer(made, config)
    assert dispatch.chosen()["adamw"]["backend"] == "torch"
    assert "by name" not in dispatch.chosen()["adamw"]["reason"]
    with pytest.raises(UserError, match=r"backends.adamw: 'native' is not allowed with train.groups"):
        build_optimizer(made, config, "native")
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(owner) == len(list(made.parameters()))
    peaks = {"embedding.weight": 1e-4, "blocks.1.mixer.qkv.weight": 2e-3, "blocks.0.mixer.qkv.weight": 1e-2}
    assert owner[id(made.get_parameter("blocks.1.mixer.qkv.weight"))]["weight_decay"] == 0.5
    assert owner[id(made.get_parameter("blocks.1.norm1.weight"))]["weight_decay"] == 0
    for step, share in ((0, 0.25), (3, 1.0), (4, 1.0), (12, 0.5), (20, 0.0)):
        assert set_learning_rates(optimizer, config, step, step / 20) == pytest.approx(
            1e-6 + share * (1e-2 - 1e-6), rel=1e-3
        )
        for name, peak in peaks.items():
            rate = owner[id(made.get_parameter(name))]["lr"]
            assert rate == pytest.approx(peak * share if step < 4 else 1e-6 + share * (peak - 1e-6)), (name, step)


def test_a_group_that_begins_later_is_warmed_up_to_what_the_decay_has_left():
    config = groups({"blocks.0.*": {"begins_at": 6}}, learning_rate=1.0, warmup=4, schedule="linear")
    optimizer = build_optimizer(model(), config)
    (late, *_), (own, *_) = (
        [group for group in optimizer.param_groups if group["begins_at"] == start] for start in (6, 0)
    )
    found = []
    for step in range(5, 12):
        set_learning_rates(optimizer, config, step, step / 20)
        found.append(late["lr"] / own["lr"])
    assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_unfreezing_says_when_something_changes():
    made = model()
    parameters = grouped(made, groups({"blocks.0.*": {"begins_at": 3}, "blocks.1.*": {"freeze": True}}))
    assert [set_training(parameters, step) for step in (0, 1, 3, 4)] == [True, False, True, False]
    frozen = sum(p.numel() for p in made.blocks[1].parameters())
    sizes = num_weights(parameters)
    assert sizes["parameters"] - sizes["trained"] == frozen
    assert {name for name, p in made.named_parameters() if not p.requires_grad} == {
        f"blocks.1.{name}" for name, _ in made.blocks[1].named_parameters()
    }


GROUPS = {"blocks.0.*": {"freeze": True}, "embedding.*": {"learning_rate": 1e-3}, "blocks.1.mixer.*": {"begins_at": 7}}


@pytest.mark.parametrize("broken", [5, 8, 11], ids=lambda step: f"before {step}")
def test_a_run_with_frozen_and_late_groups_continues_exactly(broken: int, continued: Callable[[RunConfig, int], Path]):
    folder = continued(tiny_config({"dropout": 0.1}, groups=GROUPS), broken)
    result = json.loads((folder / "result.json").read_text())
    assert result["trained_parameters"] < result["parameters"]


def test_frozen_weights_stay_and_have_no_moments_and_late_ones_get_theirs_when_they_begin(tmp_path: Path):
    config = tiny_config(groups=GROUPS, save_every=6, keep=9)
    train(config, tmp_path / "run")
    torch.manual_seed(config.train.seed)
    start = config.model.build(prepare(config).context).state_dict()
    end = load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in end if not name.startswith("blocks.0.")}
    early, late = (read_checkpoint(path)[0] for path in list_checkpoints(tmp_path / "run" / "checkpoints"))
    for tensors, begun in ((early, False), (late, True)):
        moments = {name.split(".", 2)[2] for name in tensors if name.startswith("optimizer.")}
        assert not any(name.startswith("blocks.0.") for name in moments)
        assert ("blocks.1.mixer.qkv.weight" in moments) == begun
        assert "blocks.1.norm1.weight" in moments
    assert torch.equal(early["model.blocks.1.mixer.qkv.weight"], start["blocks.1.mixer.qkv.weight"])


def test_a_group_counts_for_nothing_where_there_is_none(tmp_path: Path):
    train(tiny_config(), tmp_path / "plain")
    train(tiny_config(groups={"blocks.0.*": {"learning_rate": 3e-3}}), tmp_path / "same")
    plain, same = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "same"))
    for name, tensor in plain.items():
        torch.testing.assert_close(same[name], tensor)
