"""A run of a second, for tests: two-digit addition, a model of a few thousand weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from trivium.config import from_dict
from trivium.data.stream import TrainStream
from trivium.train.config import RunConfig

TIMINGS = ("seconds", "tokens_per_second")


def tiny_config(model: dict[str, Any] | None = None, task: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Return a small run; `train` overrides its options."""
    options = {"steps": 12, "batch": 16, "warmup": 3, "precision": "float32", "threads": 1}
    options |= {"eval_every": 4, "eval_examples": 20, "log_every": 2, "save_every": 3}
    if "tokens" in train or "epochs" in train:
        del options["steps"]
    if "batch_tokens" in train:
        del options["batch"]
    return from_dict(
        RunConfig,
        {
            "task": {"kind": "addition", "max_digits": 2, **(task or {})},
            "model": {"width": 16, "heads": 2, "positions": "learned", "layers": "attention*2", **(model or {})},
            "train": options | train,
            "evaluate": {"examples": 10, "samples": 3},
        },
    )


def rows(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without timings, which differ from run to run."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in TIMINGS}
        for row in found
        if split in (None, row["split"])
    ]


def weights(folder: Path) -> bytes:
    """Return the bytes of the final weights."""
    return (folder / "model" / "model.safetensors").read_bytes()


def broken_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the next run fail, as a dying machine does, when it asks for the problems of `step`."""
    true = TrainStream.batch

    def batch(self: TrainStream, at: int, *rest: Any) -> Any:
        if at == step:
            raise RuntimeError("the machine died")
        return true(self, at, *rest)

    monkeypatch.setattr(TrainStream, "batch", batch)
