"""A run that is killed, interrupted or continued elsewhere ends as if nothing had been: in processes of their own."""

import os
import signal
import time

import pytest

from tests.train.tiny import rows, tiny_config, weights
from trivium.data.stream import TrainStream
from trivium.train.checkpoint import list_checkpoints
from trivium.train.loop import train
from trivium.train.stop import Interrupted

# Dropout, so that the random numbers matter too.
MODEL = {"dropout": 0.1}

# Kills itself (as by kill -9) the Nth time that it forces a file to the disk: in the middle of a configuration, of a
# checkpoint, between checkpoint and metrics ...
KILLER = """
import os, signal, sys
from pathlib import Path
from tests.train.tiny import tiny_config
from trivium.train.loop import train

fsync, calls = os.fsync, 0
def count(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = count
train(tiny_config({"dropout": 0.1}), Path(sys.argv[1]))
"""

SLOW = """
import sys, time
from pathlib import Path
from tests.train.tiny import tiny_config
from trivium.data.stream import TrainStream
from trivium.train import loop
from trivium.train.stop import Interrupted

batch = TrainStream.batch
def slow(self, *arguments):
    time.sleep(0.05)
    return batch(self, *arguments)
TrainStream.batch = slow
try:
    loop.train(tiny_config({"dropout": 0.1}), Path(sys.argv[1]))
except Interrupted as stopped:
    sys.exit(str(stopped))
"""


@pytest.fixture
def unbroken(whole):
    return whole(tiny_config(MODEL))


def assert_equal_runs(one, two):
    assert rows(one) == rows(two)
    assert weights(one) == weights(two)


def test_a_run_killed_in_the_middle_of_any_write_ends_bit_for_bit_as_an_unbroken_one(warm, unbroken, tmp_path):
    codes = []
    for moment in (1, 4, 9, 7, 12, 11, 14, 10**9):
        process = warm.start(KILLER, tmp_path / "run", moment)
        codes.append(process.wait())
    assert codes.count(-signal.SIGKILL) >= 5, process.err
    assert codes[-1] == 0, process.err
    assert_equal_runs(tmp_path / "run", unbroken)


def wait_for_step(folder, step):
    """Wait until metrics.jsonl has come to `step`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(folder)):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run did not come to step {step}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_gets_a_signal_between_steps_continues_to_the_same_end(warm, unbroken, tmp_path, number):
    process = warm.start(SLOW, tmp_path / "run")
    wait_for_step(tmp_path / "run", 4)
    process.send_signal(number)
    status, message = process.wait(), process.err
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 1
        step = list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name
        assert f"interrupted by {number.name}" in message
        assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / step}" in message
        assert "Traceback" not in message
    train(tiny_config(MODEL), tmp_path / "run")
    assert_equal_runs(tmp_path / "run", unbroken)


def test_a_run_interrupted_at_each_step_in_turn_ends_as_an_unbroken_one(unbroken, tmp_path, monkeypatch):

    gather, folder, stops = TrainStream.batch, tmp_path / "run", 0

    def interrupting(self, step, *arguments):
        if step == stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return gather(self, step, *arguments)

    monkeypatch.setattr(TrainStream, "batch", interrupting)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    while stops < 12:
        with pytest.raises(Interrupted, match=f"interrupted by SIGTERM after step {stops};") as caught:
            train(tiny_config(MODEL), folder)
        assert (caught.value.step, caught.value.checkpoint) == (stops, folder / "checkpoints" / f"step-{stops}")
        stops += 1
    train(tiny_config(MODEL), folder)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert_equal_runs(folder, unbroken)


def test_a_signal_during_the_final_evaluation_stops_at_once_and_only_that_is_done_again(
    unbroken, tmp_path, monkeypatch
):
    from trivium.train import finish

    score = finish.evaluate

    def interrupting(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return score(*arguments, **options)

    monkeypatch.setattr(finish, "evaluate", interrupting)
    with pytest.raises(Interrupted, match="interrupted by SIGINT after the last step"):
        train(tiny_config(MODEL), tmp_path / "run")
    monkeypatch.setattr(finish, "evaluate", score)
    reports = []
    train(tiny_config(MODEL), tmp_path / "run", on_progress=reports.append)
    assert reports == []
    assert_equal_runs(tmp_path / "run", unbroken)
