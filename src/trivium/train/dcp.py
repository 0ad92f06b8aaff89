"""Checkpoints of torch's distributed checkpoint (DCP) that another trainer wrote of one of our models.

Its tensors are read as tensors, but the list of them, `.metadata`, is a pickle, which can run any code when it is read.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from trivium.config import UserError
from trivium.model.base import LanguageModel
from trivium.model.context import model_context
from trivium.tasks.base import Task
from trivium.train.config import RunConfig
from trivium.train.objectives import decoding_of

METADATA = ".metadata"


def model_of_dcp(
    folder: Path, config: RunConfig, *, trust_pickle: bool, prefix: str | None = None
) -> tuple[LanguageModel, Task]:
    """Return (model, task) of a run of `config` whose weights lie in the DCP folder `folder`, in their own precision.

    `prefix` stands before the model's names there; by default it is found. Raises UserError when the folder is none,
    is damaged, does not hold this model, or its pickle is not trusted.
    """
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder}: not a DCP folder: it has no {METADATA}")
    if not trust_pickle:
        raise UserError(
            f"{folder / METADATA}: is a pickle, which can run any code when it is read; "
            "add --trust-pickle if you trust who wrote it"
        )
    task = config.task.build()
    with torch.random.fork_rng(devices=[]):
        model = config.model.build(model_context(task, config.model, config.evaluate.lengths))
    model.decoding = decoding_of(config.train, task)
    wanted = model.state_dict()
    stored = _stored(folder)
    prefix = _prefix(folder, wanted, stored, prefix)
    tensors = {name: _empty(folder, prefix + name, stored[prefix + name], value) for name, value in wanted.items()}
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
            load(named, storage_reader=FileSystemReader(folder), no_dist=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"{folder}: damaged: {reason}") from None
    model.load_state_dict(tensors, assign=True)
    return model.eval(), task


def _stored(folder: Path) -> dict[str, Any]:
    try:
        return FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # of a pickle that is cut short or of other classes, anything
        raise UserError(f"{folder / METADATA}: damaged or not DCP's: {type(error).__name__}: {error}") from None


def _prefix(folder: Path, wanted: dict[str, Tensor], stored: dict[str, Any], given: str | None) -> str:
    """Return what stands before every wanted name in `stored`."""
    first = next(iter(wanted))
    found = [name.removesuffix(first) for name in stored if name == first or name.endswith("." + first)]
    prefixes = [given] if given is not None else found
    whole = [prefix for prefix in prefixes if all(prefix + name in stored for name in wanted)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise UserError(f"--prefix: {folder} holds this model more than once; allowed: {', '.join(map(repr, whole))}")
    best = prefixes[0] if prefixes else ""
    missing = next(name for name in wanted if best + name not in stored)
    shown = ", ".join(sorted(name for name in stored if isinstance(stored[name], TensorStorageMetadata))[:3])
    raise UserError(
        f"{folder}: not a model of this recipe: it lacks {best}{missing}; it holds {shown or 'no tensors'} ..."
    )


def _empty(folder: Path, name: str, stored: Any, wanted: Tensor) -> Tensor:
    """Return a tensor to read `name` into, in the precision in which it is stored."""
    if not isinstance(stored, TensorStorageMetadata) or stored.size != wanted.shape:
        there = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else "no tensor"
        raise UserError(
            f"{folder}: not a model of this recipe: {name} is {there}, the model's is {tuple(wanted.shape)}"
        )
    return torch.empty(stored.size, dtype=stored.properties.dtype)
