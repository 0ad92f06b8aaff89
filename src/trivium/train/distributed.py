"""Many processes under torchrun, as a few plain functions: gloo between CPUs, NCCL between GPUs, DDP for gradients.

Without torchrun's environment there is one process and every function does nothing or returns its argument.
"""

import atexit
import inspect
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trivium.config import UserError
from trivium.train.stop import TrainingStopped

T = TypeVar("T")

# Others wait at a collective while the first process evaluates and writes.
_PATIENCE = timedelta(hours=2)

_parallel: WeakSet[DistributedDataParallel] = WeakSet()


@dataclass(frozen=True)
class World:
    """This process among all: its rank, its rank on this machine, and how many there are."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0


def world_of_environment() -> World:
    """Read the place that torchrun gave this process; one process alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (
        World(int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0")), size) if size > 1 else World()
    )


def join(world: World, device: torch.device) -> None:
    """Meet the other processes, once in the life of this one; it takes its leave when it ends."""
    if world.size == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_PATIENCE, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    # Not after each run: a group that is made a second time may find the addresses of the first.
    atexit.register(leave)


def leave() -> None:
    """Take leave of the other processes.

    What averages gradients (DDP's reducer) goes first: as the last to hold the group it would wait, with Python's lock,
    for the group's threads, which may wait for that lock. It may have outlived its run in the frames of an error.
    """
    for model in _parallel:
        del model.reducer, model.logger
    _parallel.clear()
    dist.destroy_process_group()


def parallel(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Wrap `model` so that a backward pass averages its gradients over all processes."""
    if world.size == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    # Buffers (masks, frequencies) are constants of the config, equal everywhere without being sent at each step.
    # torch 2.13 renamed the option and warns of its old name.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    unsent: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    made = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **unsent)
    _parallel.add(made)
    return made


def exchange(model: nn.Module, last: bool) -> Any:
    """Return the context of one backward pass: gradients travel only in the `last` of a step."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def sum_over_processes(values: list[float], world: World, device: torch.device) -> list[float]:
    """Return the sums of `values` over all processes."""
    if world.size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_tensor(value: torch.Tensor, world: World) -> torch.Tensor:
    """Sum `value` over all processes in place, without waiting for the device, and return it."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def gather_bytes(value: torch.Tensor, world: World, device: torch.device) -> list[torch.Tensor]:
    """Return the uint8 tensors `value`, of one length, of all processes in the order of their ranks, on the CPU."""
    if world.size == 1:
        return [value]
    mine = value.to(device)
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(everyone, mine)
    return [tensor.cpu() for tensor in everyone]


def from_first(world: World, function: Callable[[], T]) -> T:
    """Call `function` in the first process alone and return its value in all; its error is raised in all too."""
    if world.size == 1:
        return function()
    outcome: list[Any] = [None, None]
    error: BaseException | None = None
    if world.first:
        try:
            outcome[0] = function()
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
            foreseen = isinstance(caught, UserError | TrainingStopped | OSError | KeyboardInterrupt)
            outcome[1] = caught if foreseen else RuntimeError(f"the first process failed: {caught!r}")
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
