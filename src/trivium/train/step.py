"""One training step: the forward pass, the loss, the gradients and the update."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trivium.train.distributed import World, exchange, sum_tensor
from trivium.train.mixtures import Mixtures
from trivium.train.objectives import NextToken
from trivium.train.optim import clip_and_update
from trivium.train.precision import Precision
from trivium.train.reads import Read


@dataclass(frozen=True)
class Step:
    """A training step of `forward`, a model or what wraps one, by `optimizer`. Nothing in it waits for a device."""

    forward: nn.Module
    objective: NextToken
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    parameters: list[nn.Parameter]
    clip: float | None
    precision: Precision
    world: World
    mixtures: Mixtures = field(default_factory=Mixtures)

    def __call__(self, passes: Sequence[Read], weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """Train on what `passes` read; return the loss over all processes and the gradient norm before clipping.

        `weight` is the weight of the whole batch, over all its passes and processes.
        """
        loss = torch.zeros((), device=self.parameters[0].device)
        for index, read in enumerate(passes):
            with exchange(self.forward, last=index == len(passes) - 1):
                with self.precision.autocast():
                    part_loss = self.objective.read_loss(self.forward, read) / weight
                # DDP averages gradients over processes; the loss of the whole batch needs their sum.
                minimised = part_loss * self.world.size + self.mixtures.penalty() / len(passes)
                self.scaler.scale(minimised).backward()
                loss += part_loss.detach()
        norm = clip_and_update(self.optimizer, self.scaler, self.parameters, self.clip)
        self.optimizer.zero_grad(set_to_none=True)
        return sum_tensor(loss, self.world), norm
