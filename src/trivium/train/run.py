"""The folder of one run: its configuration, environment, metrics, checkpoints, model and result.

    config.yaml  environment.json  metrics.jsonl  checkpoints/step-N/  model/  samples.jsonl  result.json
    answers.jsonl, with evaluate.keep_answers

result.json is written last: a folder that has it is finished.
"""

import errno
import fcntl
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trivium.config import UserError, config_hash, from_dict, load_yaml, results_only, to_dict, to_yaml
from trivium.data.tokenizers import Tokenizer, tokenizer_of
from trivium.model.base import LanguageModel
from trivium.model.card import training_record
from trivium.model.context import model_context
from trivium.model.folder import CONFIG_FILE, WEIGHTS_FILE
from trivium.model.folder import load as load_finished
from trivium.report.folder import read_json
from trivium.report.storage import make_folders, naming, write_whole
from trivium.tasks.base import Task
from trivium.train.checkpoint import load_model_tensors, newest_good, read_checkpoint
from trivium.train.config import RunConfig
from trivium.train.mixtures import for_reading
from trivium.train.objectives import decoding_of
from trivium.train.precision import DTYPES

CONFIG, ENVIRONMENT, METRICS, RESULT, SAMPLES, ANSWERS = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "result.json",
    "samples.jsonl",
    "answers.jsonl",
)
_LOCK = "run.lock"

_log = logging.getLogger("trivium")


class Run:
    """A run folder. `open` claims it for this process, `close` lets others have it; only the owner may write."""

    def __init__(self, folder: str | Path, config: RunConfig):
        self.folder = Path(folder)
        self.config = config
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def result(self) -> dict[str, Any] | None:
        """Return the content of result.json, or None while the run is not finished."""
        return read_json(self.folder / RESULT)

    def environment(self) -> dict[str, Any] | None:
        """Return the record of the run's first start, or None before it."""
        return read_json(self.folder / ENVIRONMENT)

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Record what the run depends on."""
        write_whole(self.folder / ENVIRONMENT, json.dumps(environment, indent=1) + "\n")

    def write_result(
        self, result: dict[str, Any], samples: list[dict[str, Any]], answers: list[dict[str, Any]] | None = None
    ) -> None:
        """Write samples.jsonl and any answers.jsonl, then result.json, which marks the run as finished."""
        for name, rows in ((SAMPLES, samples), (ANSWERS, answers)):
            if rows is not None:
                write_whole(self.folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        write_whole(self.folder / RESULT, json.dumps(result, indent=1) + "\n")

    def open(self) -> None:
        """Make the folder, or claim one of the same configuration to continue it.

        Raises UserError when the folder holds something else, a run of another configuration, or is being trained
        by another process, and OSError when it cannot be written.
        """
        try:
            make_folders(self.folder)
            names = [path.name for path in self.folder.iterdir()]
            strangers = [name for name in names if name != _LOCK and not name.endswith(".tmp")]
            if strangers and CONFIG not in strangers:
                raise UserError(
                    f"{self.folder}: not a run folder: it holds {min(strangers)} but no {CONFIG}; give another folder"
                )
            self._lock = _hold(self.folder)
            if CONFIG in strangers:
                _refuse_other(self.folder, self.config)
            else:
                write_whole(self.folder / CONFIG, to_yaml(self.config))
        except (OSError, UserError):
            self.close()
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def open_run(folder: str | Path, config: RunConfig) -> Run:
    """Return the claimed run folder; see `Run.open`."""
    run = Run(folder, config)
    run.open()
    return run


def _hold(folder: Path) -> IO[str]:
    """Lock the folder. The system drops the lock of a process that dies, so a stale file never blocks."""
    lock = (folder / _LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"{folder}: is being trained by another process ({owner or 'unknown'})") from None
        raise
    with naming(folder / _LOCK):
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
    return lock


def _refuse_other(folder: Path, config: RunConfig) -> None:
    stored = read_config(folder)
    if config_hash(stored) == config_hash(config):
        return
    there, here = _leaves(results_only(stored)), _leaves(results_only(config))
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    name = names[0] if names else "its configuration"
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise UserError(
        f"{folder}: holds a run of another configuration: {name} is {there.get(name)!r} there and {here.get(name)!r} "
        f"here{more}; give another folder"
    )


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _leaves(item, f"{path}.{key}" if path else key)
    return found


def read_config(folder: str | Path) -> RunConfig:
    """Return the configuration of the run in `folder`; raise UserError if it is not a run folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a run folder: it has no {CONFIG}")
    data = load_yaml(folder / CONFIG)
    try:
        return from_dict(RunConfig, data)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def begin_from(model: LanguageModel, folder: Path) -> None:
    """Give `model` the weights of a run or model folder; UserError if there are none, or of another model."""
    path = weights_of(folder)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"train.init_from: {path}: damaged or not a safetensors file: {error}") from None
    load_model_tensors(model, {f"model.{name}": tensor for name, tensor in tensors.items()}, path)


def weights_of(folder: Path) -> Path:
    """Return the file of weights in a run or model folder; UserError where there is none."""
    for path in (folder / "model" / WEIGHTS_FILE, folder / WEIGHTS_FILE):
        if path.is_file():
            return path
    raise UserError(f"train.init_from: {folder}: no run or model folder: it has no {WEIGHTS_FILE}, in model/ or itself")


def load(folder: str | Path) -> tuple[LanguageModel, Tokenizer, Task]:
    """Return (model, tokenizer, task) of a run folder or a model folder, the model on the CPU, in eval mode.

    A run that has no final model yet gives that of its newest good checkpoint, and a warning in the log says so.
    Raises UserError when `folder` is neither, has neither, or a file in it is missing, damaged or of another model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or (folder / "model").exists():
        return load_finished(folder)
    config = read_config(folder)
    path = newest_good(folder / "checkpoints")
    if path is None:
        raise UserError(f"{folder}: this run has no model and no checkpoint yet")
    _log.warning("%s: this run has not finished; using its newest good checkpoint, %s", folder, path.name)
    task = config.task.build()
    with torch.random.fork_rng(devices=[]):
        model = config.model.build(model_context(task, config.model, config.evaluate.longest))
    tensors, scalars = read_checkpoint(path)
    model.decoding = replace(decoding_of(config.train, task), chain_removed=scalars.get("chain_removed", 0))
    load_model_tensors(model, tensors, path)
    for_reading(model, config.train, scalars["step"])
    return model.eval(), tokenizer_of(task.alphabet), task


def scored_in(folder: str | Path) -> torch.dtype:
    """Return the dtype in which the run of a run folder or a model folder scores its own test."""
    folder = Path(folder)
    record = training_of(folder) or {}
    if record.get("recipe", {}).get("evaluate", {}).get("precision") != "training":
        return torch.float32
    begun = (read_json(folder / ENVIRONMENT) or {}).get("precision", {}).get("name")  # of one that has not finished
    return DTYPES.get(record.get("precision") or begun, torch.float32)


def training_of(folder: str | Path) -> dict[str, Any] | None:
    """Return the `training_record` of a run folder, or that which a model folder has, if any."""
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        return training_record(to_dict(read_config(folder)), read_json(folder / RESULT))
    inside = read_json(folder / CONFIG_FILE) or read_json(folder / "model" / CONFIG_FILE)
    return (inside or {}).get("trained")
