"""Which parameters train, from when on, and how: patterns of names to groups of parameters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from trivium.config import UserError
from trivium.model.base import ModelConfig, ModelContext
from trivium.train.config import GroupConfig, TrainConfig
from trivium.train.mixtures import mixtures_of

WHOLE = GroupConfig()


def owners(names: list[str], groups: Mapping[str, GroupConfig]) -> dict[str, str | None]:
    """Return the pattern that counts for each name, the first that fits; None where none does.

    `*` stands for any characters, `?` for one, `[0-3]` for one of those. Raises UserError for a pattern that counts for
    no name: it fits none, or earlier patterns fit all of its own.
    """
    owned = {name: next((pattern for pattern in groups if fnmatchcase(name, pattern)), None) for name in names}
    for pattern in groups:
        if pattern in owned.values():
            continue
        if any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"train.groups: {pattern!r}: every parameter that it fits belongs to a pattern before it")
        shown = ", ".join(dict.fromkeys(_short(name) for name in names))
        raise UserError(f"train.groups: {pattern!r} fits no parameter; their names are {shown}")
    return owned


def _short(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}.*" if first == "blocks" else name


@dataclass(frozen=True)
class Parameter:
    """One parameter with its group; a tied one stands once, under its first name."""

    name: str
    weight: nn.Parameter
    group: GroupConfig
    pattern: str | None

    def trains_at(self, step: int) -> bool:
        """Say whether it trains in the step that follows `step` finished ones."""
        return not self.group.freeze and step >= self.group.begins_at


def grouped(model: nn.Module, config: TrainConfig) -> list[Parameter]:
    """Return every parameter of `model` in its order; raise UserError as `owners` does."""
    named = dict(model.named_parameters())
    owned = owners(list(named), config.groups)
    found = [
        Parameter(name, weight, config.groups[pattern] if (pattern := owned[name]) is not None else WHOLE, owned[name])
        for name, weight in named.items()
    ]
    if not any(each.trains_at(0) for each in found):
        raise UserError("train.groups: no parameter trains in the first step; let one begin at 0")
    return found


def check_groups(config: TrainConfig, model: ModelConfig, context: ModelContext) -> None:
    """Raise UserError for groups, or a step to switch experts on, that do not fit the model, without making one."""
    if config.groups or config.experts_from:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = model.build(context)
        grouped(made, config)
        mixtures_of(made, config)


def set_training(parameters: list[Parameter], step: int) -> bool:
    """Freeze and unfreeze for the step that follows `step` finished ones; say whether anything changed."""
    changed = False
    for each in parameters:
        trains = each.trains_at(step)
        changed |= each.weight.requires_grad != trains
        each.weight.requires_grad_(trains)
        if not trains:
            each.weight.grad = None
    return changed


def starts(parameters: list[Parameter]) -> Iterator[int]:
    """Yield the steps at which parameters begin to train, ascending, the first aside."""
    yield from sorted({each.group.begins_at for each in parameters if not each.group.freeze} - {0})


def num_weights(parameters: list[Parameter]) -> dict[str, int]:
    """Return {"parameters", "trained"}: how many weights there are, and how many of them ever train."""
    return {
        "parameters": sum(each.weight.numel() for each in parameters),
        "trained": sum(each.weight.numel() for each in parameters if not each.group.freeze),
    }
