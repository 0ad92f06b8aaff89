"""One training step: what it reads, and the forward pass, the loss, the gradients and the update.

Shapes: B examples of one pass, T tokens, N scored tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trivium.tasks.base import Batch
from trivium.train.distributed import World, exchange, sum_tensor
from trivium.train.objectives import NextToken
from trivium.train.optim import clip_gradients
from trivium.train.precision import Precision


class Read(NamedTuple):
    """What one forward pass reads: tokens, the places in the flattened B*T that are scored, their targets, weights.

    The entries are arrays on the way to a device and tensors on it.
    """

    tokens_BT: Any
    wanted_N: Any
    targets_N: Any
    weights_N: Any


def room(count: int, least: int = 1) -> int:
    """Return a number from `count` up that is among 16 to each power of two, and a multiple of `least`, a power of two;
    so that few shapes come up.
    """
    step = max(1 << max(0, count.bit_length() - 5), least)
    return -(-count // step) * step


def reads(
    batch: Batch, weights_BT: np.ndarray, micro_batch: int | None = None, *, longest: int | None = None, pad_id: int = 0
) -> list[Read]:
    """Return what each forward pass of a step on `batch` reads; logits are made only where they are scored.

    With `longest`, the most tokens of any batch, rows are filled up with `pad_id` and the scored places with others,
    whose weight is 0, to a `room`: batches then share a few shapes, and the loss is the same.
    """
    tokens_BT, targets_BT = batch.tokens_BT, batch.targets_BT
    if longest is not None:
        tokens = tokens_BT.shape[1]
        behind = ((0, 0), (0, max(min(room(tokens), longest) - tokens, 0)))
        tokens_BT, targets_BT = (np.pad(x, behind, constant_values=pad_id) for x in (tokens_BT, targets_BT))
        weights_BT = np.pad(weights_BT, behind)
    part = micro_batch or len(batch)
    parts = [slice(start, start + part) for start in range(0, len(batch), part)]
    scored = [np.flatnonzero(weights_BT[rows]) for rows in parts]
    if longest is not None:
        wanted = room(max(len(wanted_N) for wanted_N in scored), 16)
        spare = [np.flatnonzero(weights_BT[rows] == 0) for rows in parts]
        scored = [np.concatenate((a, b[: max(wanted - len(a), 0)])) for a, b in zip(scored, spare, strict=True)]
    return [
        Read(tokens_BT[rows], wanted_N, targets_BT[rows].ravel()[wanted_N], weights_BT[rows].ravel()[wanted_N])
        for rows, wanted_N in zip(parts, scored, strict=True)
    ]


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

    def __call__(self, passes: Sequence[Read], weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """Train on what `passes` read; return the loss over all processes and the gradient norm before clipping.

        `weight` is the weight of the whole batch, over all its passes and processes.
        """
        loss = torch.zeros((), device=self.parameters[0].device)
        for index, read in enumerate(passes):
            with exchange(self.forward, last=index == len(passes) - 1):
                with self.precision.autocast():
                    logits_NV, _ = self.forward(read.tokens_BT, wanted_N=read.wanted_N)
                part_loss = self.objective.loss_sum(logits_NV, read.targets_N, read.weights_N) / weight
                # DDP averages gradients over processes; the loss of the whole batch needs their sum.
                self.scaler.scale(part_loss * self.world.size).backward()
                loss += part_loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return sum_tensor(loss, self.world), norm
