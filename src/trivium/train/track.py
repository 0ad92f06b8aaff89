"""Where metrics go: metrics.jsonl always, and TensorBoard, Weights & Biases and Trackio when the recipe asks."""

import errno
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from trivium.config import UserError
from trivium.train.config import TrackConfig

Row = dict[str, Any]


def load_extras(config: TrackConfig) -> None:
    """Import the packages that `config` asks for; raise UserError with the pip command for one that is missing."""
    wanted = {
        "torch.utils.tensorboard": config.tensorboard,
        "wandb": config.wandb is not None,
        "trackio": config.trackio is not None,
    }
    for module in (name for name, asked in wanted.items() if asked):
        try:
            importlib.import_module(module)
        except ImportError as error:
            name = module.rsplit(".", 1)[-1]
            raise UserError(
                f"track.{name}: {name} is not installed ({error}); pip install 'trivium[track]' brings it"
            ) from None


class Tracker:
    """Writes each row of metrics to metrics.jsonl at once, and passes it on to the sinks of `config`.

    Rows after `step` (where the run continues from; 0 for its beginning) are dropped from metrics.jsonl first.
    `settings` is the recipe as plain data, shown by W&B and Trackio beside the curves.

    The rows of a continued run that come again between its checkpoint and where it died hold the same values but for
    timings: TensorBoard drops the old ones, W&B ignores those of steps that it has, and Trackio has both.
    """

    def __init__(self, path: Path, config: TrackConfig, settings: dict[str, Any], step: int = 0):
        load_extras(config)
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        self._file = path.open("r+b" if path.exists() else "wb", buffering=0)
        self._file.truncate(sum(len(line) for line in kept))
        self._file.seek(0, os.SEEK_END)
        folder = path.parent
        self._sinks: list[tuple[Callable[[Row, int], Any], Callable[[], Any]]] = []
        if config.tensorboard:
            self._sinks.append(_tensorboard(folder, step))
        if config.wandb is not None:
            self._sinks.append(_wandb(folder, config.wandb, settings))
        if config.trackio is not None:
            self._sinks.append(_trackio(folder, config.trackio, settings))

    def log(self, row: Row) -> None:
        """Write `row`, which has "step" and "split", before returning: a killed process loses no finished row."""
        line = json.dumps(row).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._sinks:
            split = row["split"]
            scores = {f"{split}/{key}": value for key, value in row.items() if key not in ("step", "split")}
            scores = {key: value for key, value in scores.items() if value is not None}
            for log, _ in self._sinks:
                log(scores, row["step"])

    def sync(self) -> None:
        """Force metrics.jsonl to the disk, so that no checkpoint is ahead of it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish every sink."""
        self._file.close()
        for _, close in self._sinks:
            close()


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines of `path` up to the first that a killed process left unfinished."""
    if not path.exists():
        return []
    whole: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"}\n"):
            break
        whole.append(line)
    return whole


def _tensorboard(folder: Path, step: int) -> tuple[Callable[[Row, int], Any], Callable[[], Any]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(scores: Row, at: int) -> None:
        for name, value in scores.items():
            writer.add_scalar(name, value, at)

    return log, writer.close


def _wandb(folder: Path, project: str, settings: dict[str, Any]) -> tuple[Callable[[Row, int], Any], Callable[[], Any]]:
    import wandb

    # The folder's name holds the hash of the configuration, so that a continued run is the same run there too.
    run = wandb.init(
        project=project,
        name=folder.name,
        id=re.sub(r"[^\w.-]", "-", folder.name),
        resume="allow",
        dir=folder,
        config=settings,
        settings=wandb.Settings(console="off", silent=True),
    )
    return lambda scores, at: run.log(scores, step=at), run.finish


def _trackio(
    folder: Path, project: str, settings: dict[str, Any]
) -> tuple[Callable[[Row, int], Any], Callable[[], Any]]:
    import trackio

    with redirect_stdout(sys.stderr):  # standard output belongs to the program's results
        run = trackio.init(
            project=project,
            name=folder.name,
            resume="allow",
            config=settings,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def close() -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()  # the run's own finish would be repeated, aloud, when the program exits

    return lambda scores, at: run.log(scores, step=at), close
