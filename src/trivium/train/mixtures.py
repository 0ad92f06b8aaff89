"""A model's mixtures of experts in training: when they are switched on, the loss that balances them, and their load."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trivium.config import UserError
from trivium.mixers.routing import Switched
from trivium.train.config import TrainConfig


@dataclass(frozen=True)
class Mixtures:
    """The mixtures of a model by their names, the weight of the balancing loss, and the step that they wait for.

    A model without any has none to switch, and no penalty.
    """

    named: Mapping[str, Switched] = field(default_factory=dict)
    weight: float = 0.0
    begin: int = 0

    def resume(self, step: int) -> None:
        """Switch them on or off for a run of which `step` steps are done; what comes before `begin` is done in them."""
        for each in self.named.values():
            each.on = self.begin == 0 or step > self.begin

    def advance(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        """Switch them on if the step that follows `step` finished ones is the first with them; say whether it was."""
        if not self.named or not 0 < self.begin == step:
            return False
        self.spread(optimizer)
        return True

    def spread(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Switch on what is not, with copies of the first expert: nothing that is computed changes."""
        for each in self.named.values():
            if not each.on:
                each.spread(optimizer)
                each.on = True

    def penalty(self) -> Tensor | float:
        """Return the weighted balancing loss of the last forward pass, the mean over the mixtures that are on."""
        found = [each.penalty for each in self.named.values() if each.on and each.penalty is not None]
        return self.weight * torch.stack(found).mean() if found and self.weight else 0.0

    def take_load(self) -> dict[str, float]:
        """Return the row of metrics of what came since the last: each expert's share of the places, and the balance.

        "balance.NAME" is the number of experts times the sum of the squared shares: 1 when all are even.
        """
        row: dict[str, float] = {}
        for name, each in self.named.items():
            counts = each.load_E.tolist()
            each.load_E.zero_()
            if not each.on or not sum(counts):
                continue
            shares = [count / sum(counts) for count in counts]
            row |= {f"load.{name}.{index}": share for index, share in enumerate(shares)}
            row[f"balance.{name}"] = len(shares) * sum(share**2 for share in shares)
        return row

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of the load."""
        return {f"load.{name}": each.load_E for name, each in self.named.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, each in self.named.items():
            each.load_E.copy_(tensors[f"load.{name}"])


def mixtures_of(model: nn.Module, config: TrainConfig) -> Mixtures:
    """Return the mixtures of `model`; raise UserError for a step to switch on what is not there."""
    named = {name: module for name, module in model.named_modules() if isinstance(module, Switched)}
    if config.experts_from and not named:
        raise UserError("train.experts_from: the model has no mixture of experts to switch on; allowed: 0")
    return Mixtures(named, config.balance, config.experts_from)


def for_reading(model: Any, config: TrainConfig, step: int) -> None:
    """Make the model of a checkpoint after `step` steps one that can be read anywhere: with its mixtures on."""
    mixtures = mixtures_of(model, config)
    mixtures.resume(step)
    mixtures.spread()
