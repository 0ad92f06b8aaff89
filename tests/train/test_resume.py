"""A run that is killed, interrupted or continued elsewhere ends as if nothing had been: here in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.tiny import rows, tiny_config, weights
from trivium.data.stream import TrainStream
from trivium.train.checkpoint import list_checkpoints
from trivium.train.loop import train
from trivium.train.stop import Interrupted

ROOT = Path(__file__).parents[2]

# Dropout, so that the random numbers matter too.
MODEL = {"dropout": 0.1}

# Starts the run again and again, each time in a fresh process that kills itself (as by kill -9) the Nth time that it
# forces a file to the disk: in the middle of a configuration, of a checkpoint, between checkpoint and metrics ...
KILLER = """
import os, signal, sys
from pathlib import Path
from tests.train.tiny import tiny_config
from trivium.train.loop import train

folder, moments = Path(sys.argv[1]), [int(moment) for moment in sys.argv[2:]]
fsync = os.fsync
for moment in [*moments, 10**9]:
    child = os.fork()
    if child == 0:
        calls = 0
        def count(descriptor):
            global calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)
        os.fsync = count
        train(tiny_config({"dropout": 0.1}), folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    train(tiny_config(MODEL), folder)
    return folder


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def assert_equal_runs(one, two):
    assert rows(one) == rows(two)
    assert weights(one) == weights(two)


def test_a_run_killed_in_the_middle_of_any_write_ends_bit_for_bit_as_an_unbroken_one(unbroken, tmp_path):
    moments = [1, 4, 9, 7, 12, 11, 14]
    command = [sys.executable, "-c", KILLER, str(tmp_path / "run"), *map(str, moments)]
    ended = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True)
    codes = [int(code) for code in ended.stdout.split()]
    assert codes.count(-signal.SIGKILL) >= 5, ended.stderr
    assert codes[-1] == 0, ended.stderr
    assert_equal_runs(tmp_path / "run", unbroken)


def start_slowly(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder)], env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(folder, step):
    """Wait until metrics.jsonl has come to `step`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(folder)):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run did not come to step {step}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_gets_a_signal_between_steps_continues_to_the_same_end(unbroken, tmp_path, number):
    process = start_slowly(tmp_path / "run")
    wait_for_step(tmp_path / "run", 4)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 1
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
    from trivium.train import loop

    score = loop.evaluate

    def interrupting(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return score(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", interrupting)
    with pytest.raises(Interrupted, match="interrupted by SIGINT after the last step"):
        train(tiny_config(MODEL), tmp_path / "run")
    monkeypatch.setattr(loop, "evaluate", score)
    reports = []
    train(tiny_config(MODEL), tmp_path / "run", on_progress=reports.append)
    assert reports == []
    assert_equal_runs(tmp_path / "run", unbroken)
