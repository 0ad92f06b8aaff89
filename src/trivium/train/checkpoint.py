"""Checkpoints: a folder `step-N` of one safetensors file for every tensor and one JSON file for every scalar.

A checkpoint is written aside, read back and compared, then renamed; older ones go only after that. The JSON file
holds the size and SHA-256 of the tensors file and of itself, so that a damaged checkpoint is known as one.
"""

import hashlib
import json
import logging
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import trivium
from trivium.config import UserError
from trivium.model.folder import named_tensors
from trivium.report.storage import sync_folder, write_synced

FORMAT = 1
TENSORS = "tensors.safetensors"
SCALARS = "checkpoint.json"

_log = logging.getLogger("trivium")


class CheckpointError(RuntimeError):
    """A checkpoint that is not what was written: a file is missing, cut short or altered."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return `model.<name>` -> tensor for every parameter and buffer that is saved; tied ones once."""
    return {f"model.{name}": tensor for name, tensor in named_tensors(model).items()}


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy what `model_tensors` gave into `model`; raise UserError naming what differs if it is another model."""
    own = model_tensors(model)
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for problem, names in (("lacks", own.keys() - stored.keys()), ("has the unknown", stored.keys() - own.keys())):
        if names:
            name = min(names).removeprefix("model.")
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source}: a checkpoint of another model: it {problem} {name}{more}")
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape:
            there, here = tuple(stored[name].shape), tuple(tensor.shape)
            raise UserError(
                f"{source}: a checkpoint of another model: {name.removeprefix('model.')} has the shape {there}, "
                f"this model's is {here}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any], *, keep: int) -> Path:
    """Write `folder`/step-N and drop all but the newest `keep`; return its path.

    Raises OSError when it cannot be written and CheckpointError when it does not read back as written; in both
    cases what was there before is untouched and nothing half-written stays.
    """
    target = folder / f"step-{step}"
    if target.exists():
        try:
            read_scalars(target)
            return target  # the same step of the same run holds the same values
        except CheckpointError:
            set_aside(target)
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    record = {
        **scalars,
        "format": FORMAT,
        "step": step,
        "torch": torch.__version__,
        "trivium": trivium.__version__,
        "files": {TENSORS: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    }
    record["digest"] = _digest(record)
    aside = folder / f".step-{step}.{secrets.token_hex(4)}.tmp"
    try:
        aside.mkdir()
        write_synced(aside / TENSORS, content)
        write_synced(aside / SCALARS, json.dumps(record, indent=1).encode())
        sync_folder(aside)
        read_scalars(aside)
        aside.rename(target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    older = [path for path in list_checkpoints(folder) if _number(path) < step]
    for old in [*older, target][:-keep]:
        shutil.rmtree(old)
    return target


def _digest(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first, good or damaged."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(paths, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`; only the process that owns the run may."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to damaged-step-N, so that it is kept but never chosen, and return its new path."""
    target = path.with_name(f"damaged-{path.name}")
    if target.exists():
        shutil.rmtree(target)
    return path.rename(target)


def newest_good(folder: Path, *, rename_damaged: bool = False) -> Path | None:
    """Return the newest checkpoint that is as it was written, or None; warn about each newer one that is not.

    The process that owns the run renames damaged ones, so that they never count among those to keep.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            read_scalars(path)
            return path
        except CheckpointError as error:
            _log.warning("%s; using the one before it", error)
            if rename_damaged:
                set_aside(path)
    return None


def read_scalars(path: Path) -> dict[str, Any]:
    """Return the scalars of the checkpoint at `path` after checking all of it; raise CheckpointError if damaged."""
    try:
        record = json.loads((path / SCALARS).read_bytes())
        if record["digest"] != _digest(record):
            raise CheckpointError(f"{path}: damaged: {SCALARS} is not as it was written")
        file = record["files"][TENSORS]
        size = (path / TENSORS).stat().st_size
        if size != file["bytes"]:
            raise CheckpointError(f"{path}: damaged: {TENSORS} holds {size} bytes instead of {file['bytes']}")
        with (path / TENSORS).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: damaged: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged: {SCALARS} is not as it was written") from None
    if digest != file["sha256"]:
        raise CheckpointError(f"{path}: damaged: {TENSORS} is not as it was written (its SHA-256 differs)")
    if record["format"] != FORMAT:
        raise UserError(f"{path}: a checkpoint of format {record['format']}; this program reads format {FORMAT}")
    return record


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, scalars) of the checkpoint at `path`; raise CheckpointError if it is not whole."""
    scalars = read_scalars(path)
    return safetensors.torch.load_file(path / TENSORS), scalars
