"""The sinks, each with its real package. Those packages warn of their own dependencies, so they run in a process."""

import json
import sqlite3
import sys

import pytest

from tests.train.tiny import rows, tiny_config
from trivium.config import UserError
from trivium.train.config import TrackConfig
from trivium.train.loop import train
from trivium.train.track import Tracker

ROW = {"step": 2, "split": "train", "loss": 0.5, "gradient_norm": None}


def test_rows_are_on_the_disk_when_log_returns(tmp_path):
    tracker = Tracker(tmp_path / "metrics.jsonl", TrackConfig(), {})
    tracker.log(ROW)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == ROW
    tracker.close()


def test_rows_behind_the_checkpoint_and_half_written_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": "train"}) for step in (1, 2, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "spl')
    Tracker(path, TrackConfig(), {}, step=2).close()
    assert path.read_text() == "\n".join(lines[:3]) + "\n"
    tracker = Tracker(path, TrackConfig(), {}, step=2)
    tracker.log(ROW)
    tracker.close()
    assert len(path.read_text().splitlines()) == 4
    Tracker(path, TrackConfig(), {}).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("options", "module"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard"),
        ({"wandb": "sums"}, "wandb"),
        ({"trackio": "sums"}, "trackio"),
    ],
)
def test_a_sink_that_is_not_installed_is_refused_with_the_pip_command(tmp_path, monkeypatch, options, module):
    monkeypatch.setitem(sys.modules, module, None)
    config = tiny_config()
    object.__setattr__(config, "track", TrackConfig(**options))
    with pytest.raises(UserError, match=r"is not installed .*pip install 'trivium\[track\]'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


SINKS = """
import dataclasses, os, sys
from pathlib import Path

folder = Path(sys.argv[1])
os.environ |= {"WANDB_MODE": "offline", "HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
os.chdir(folder)
from tests.train.tiny import tiny_config
from trivium.train.config import TrackConfig
from trivium.train.loop import train

config = tiny_config(steps=4)
track = TrackConfig(tensorboard=True, wandb="sums", trackio="sums")
train(dataclasses.replace(config, track=track), folder / "run")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(str(folder / "run" / "tensorboard"))
events.Reload()
for name in ("train/loss", "validation/exact_match"):
    for event in events.Scalars(name):
        print(name, event.step, event.value)
"""


@pytest.fixture(scope="module")
def tracked(warm, tmp_path_factory):
    """A run with every sink at once, in a process: (run folder, Trackio's folder, standard output)."""
    folder = tmp_path_factory.mktemp("runs")
    process = warm.start(SINKS, folder)
    assert process.wait(timeout=240) == 0, process.err
    return folder / "run", folder / "trackio", process.out


def test_tensorboard_shows_the_rows_and_standard_output_stays_free_of_the_sinks_chatter(tracked):
    folder, _, output = tracked
    expected = [("train/loss", row["step"], row["loss"]) for row in rows(folder, "train")]
    expected += [("validation/exact_match", row["step"], row["exact_match"]) for row in rows(folder, "validation")]
    read = [line.split() for line in output.splitlines()]
    assert [(name, int(step), float(value)) for name, step, value in read] == [
        (name, step, pytest.approx(value, rel=1e-6)) for name, step, value in expected
    ]


def test_wandb_writes_an_offline_run_with_the_rows_in_it(tracked):
    folder, _, _ = tracked
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert record.stem == "run-run"
    assert b"validation/exact_match" in content
    assert b"max_digits" in content


def test_trackio_stores_the_rows_under_the_runs_name(tracked):
    folder, storage, _ = tracked
    (database,) = storage.glob("sums*.db")
    with sqlite3.connect(database) as connection:
        stored = connection.execute("select run_name, step, metrics from metrics order by step, id").fetchall()
    read = [(name, step, json.loads(metrics)) for name, step, metrics in stored]
    losses = [(name, step, metrics["train/loss"]) for name, step, metrics in read if "train/loss" in metrics]
    assert losses == [("run", row["step"], row["loss"]) for row in rows(folder, "train")]
