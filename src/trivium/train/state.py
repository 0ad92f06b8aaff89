"""What a run is made of between two steps: everything that a checkpoint keeps."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.model.base import LanguageModel
from trivium.train.checkpoint import load_model_tensors, model_tensors, read_checkpoint
from trivium.train.distributed import World, gather_bytes
from trivium.train.mixtures import Mixtures
from trivium.train.optim import load_optimizer, optimizer_tensors

# Far apart, so that neither processes nor the seeds next to one another share a generator.
_RANK_STRIDE, _STEP_STRIDE = 2**32, 2**48


@dataclass
class Position:
    """Where a run is. `row_*` is what has come since the last row of metrics, `stage` the stage of a curriculum.

    `stage` is the longest length that problems may have, 0 for the whole task, and `stage_evaluations` counts the
    evaluations since it began. `chain_removed` counts the tokens that chains of thought are shortened by, since the
    step `shortened_at`, `generated` the tokens of answers and chains that were trained on. Seconds are those of
    training; evaluations and checkpoints are not counted. `plateau_best` is the best score that a plateau is told from
    (larger is better), `plateau_stale` the evaluations since, `mixture` the weights that plateaus have set, [first
    training index, {source: weight}] each.
    """

    step: int = 0
    tokens: int = 0
    examples: int = 0
    generated: int = 0
    stage: int = 0
    stage_evaluations: int = 0
    chain_removed: int = 0
    shortened_at: int = 0
    seconds: float = 0.0
    row_steps: int = 0
    row_tokens: int = 0
    row_seconds: float = 0.0
    row_loss: float = 0.0
    train_loss: float | None = None
    validation: dict[str, Any] | None = None
    plateau_best: float | None = None
    plateau_stale: int = 0
    mixture: list[Any] = field(default_factory=list)


@dataclass
class TrainingState:
    """The model, what optimizes it, and where the run is. `seed` keys the random numbers of each process."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    at: Position
    seed: int
    world: World
    device: torch.device
    mixtures: Mixtures = field(default_factory=Mixtures)

    def seed_dropout(self) -> None:
        """Give each process its own random numbers from here on, keyed by (seed, rank, step)."""
        torch.manual_seed(self.seed + _RANK_STRIDE * self.world.rank + _STEP_STRIDE * (self.at.step % 2**15))

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name; all processes must call this, for each has random numbers of its own."""
        named = model_tensors(self.model) | optimizer_tensors(self.model, self.optimizer) | self.mixtures.tensors()
        for rank, state in enumerate(gather_bytes(torch.get_rng_state(), self.world, self.device)):
            named[f"rng.cpu.{rank}"] = state
        if self.device.type == "cuda":
            for rank, state in enumerate(gather_bytes(torch.cuda.get_rng_state(self.device), self.world, self.device)):
                named[f"rng.cuda.{rank}"] = state
        return named

    def scalars(self) -> dict[str, Any]:
        """Return every number as plain data."""
        return {
            **asdict(self.at),
            "scaler": self.scaler.state_dict(),
            "world_size": self.world.size,
            "threads": torch.get_num_threads(),
        }

    def load(self, path: Path) -> None:
        """Put back what the checkpoint at `path` keeps; raise UserError if it is of another model.

        Written by another number of processes, it continues with the same weights, moments and data, but with fresh
        random numbers for dropout.
        """
        tensors, scalars = read_checkpoint(path)
        load_model_tensors(self.model, tensors, path)
        load_optimizer(self.model, self.optimizer, tensors)
        self.mixtures.load(tensors)
        self.scaler.load_state_dict(scalars["scaler"])
        self.at = Position(**{item.name: scalars[item.name] for item in fields(Position) if item.name in scalars})
        if scalars["world_size"] != self.world.size:
            self.seed_dropout()
            return
        torch.set_rng_state(tensors[f"rng.cpu.{self.world.rank}"])
        if self.device.type == "cuda" and f"rng.cuda.{self.world.rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{self.world.rank}"], self.device)
