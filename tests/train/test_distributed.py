"""Several processes under a real torchrun, over gloo."""

import json
import shutil
import signal
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from tests.train.test_curriculum import config_of
from tests.train.tiny import rows, tiny_config
from trivium.config import UserError
from trivium.train.checkpoint import list_checkpoints, read_checkpoint
from trivium.train.distributed import World, leave, parallel, world_of_environment
from trivium.train.loop import train

# What torchrun starts for each process: it says what environment torchrun gave it, waits until a fork of a warm process
# with this environment has run the script, and ends as that did. Starting torch anew three times is what takes time.
STANDS_IN = """
import json, os, sys, time
place = os.path.join(sys.argv[1], os.environ["RANK"])
with open(place + ".part", "w") as file:
    json.dump(dict(os.environ), file)
os.replace(place + ".part", place + ".asked")
while not os.path.exists(place + ".ended"):
    time.sleep(0.02)
sys.exit(int(open(place + ".ended").read()))
"""
TORCHRUN = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"

# Uneven shares (17 rows over two processes), parts, and in the second run a halt at step 6 for the other side to take
# up. Both runs in one start, because starting is what takes time.
SCRIPT = """
import sys
from pathlib import Path
from tests.train.test_curriculum import config_of
from tests.train.tiny import tiny_config
from trivium.config import UserError
from trivium.data.stream import TrainStream
from trivium.train import finish, loop
from trivium.train.stop import Interrupted, StorageFailed

folder = Path(sys.argv[1])
reports = []
loop.train(tiny_config(batch=17, micro_batch=4), folder / "two", on_progress=reports.append)
assert bool(reports) == loop.world_of_environment().first
loop.train(tiny_config(batch=17), folder / "begun-by-one")
loop.train(config_of(dropout=0.0), folder / "staged-two")

batch = TrainStream.batch
def halting(self, step, rank, world, stage):
    if step == 6 and rank == 1:  # one process alone hears the signal, both stop
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
    return batch(self, step, rank, world, stage)
TrainStream.batch = halting
try:
    loop.train(tiny_config(batch=17), folder / "begun-by-two")
except Interrupted as stopped:
    assert stopped.step == 6
else:
    raise AssertionError("it was to stop")
TrainStream.batch = batch
try:
    loop.train(tiny_config(batch=17, seed=1), folder / "two")
except UserError as error:
    assert "another configuration" in str(error)
else:
    raise AssertionError("a folder of another configuration was taken")

def full(*arguments, **options):
    raise OSError(28, "No space left on device")
for place, name in ((loop, "save_checkpoint"), (loop.Tracker, "log"), (finish, "save_model")):
    whole = getattr(place, name)
    setattr(place, name, full)
    try:
        loop.train(tiny_config(batch=17, seed=2), folder / "full")
    except (StorageFailed, OSError) as error:
        assert "No space left on device" in str(error), error
        assert isinstance(error, StorageFailed) == (name != "save_model")
        assert getattr(error, "checkpoint", None) is None
    else:
        raise AssertionError(f"a full disk in {name} went unnoticed")
    setattr(place, name, whole)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm):
    """Runs by one process ("one"), by two ("two"), and those that one began and two ended and the other way round."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny_config(batch=17), folder / "one")
    shutil.copytree(folder / "one", folder / "begun-by-one")
    for name in ("result.json", "checkpoints/step-12"):
        path = folder / "begun-by-one" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "stands_in.py").write_text(STANDS_IN)
    launched = warm.start(TORCHRUN, "--standalone", "--nproc-per-node", 2, folder / "stands_in.py", folder)
    deadline, running = time.monotonic() + 300, {}
    try:
        while launched.poll() is None and time.monotonic() < deadline:
            for asked in folder.glob("*.asked"):
                rank, environment = asked.stem, json.loads(asked.read_text())
                asked.unlink()
                running[rank] = warm.start(SCRIPT, folder, environment=environment)
            for rank, process in running.items():
                if process.poll() is not None and not (folder / f"{rank}.ended").exists():
                    (folder / f"{rank}.part").write_text(str(process.poll()))
                    (folder / f"{rank}.part").replace(folder / f"{rank}.ended")
            time.sleep(0.02)
        assert launched.poll() == 0, [launched.err, *(process.err for process in running.values())]
    finally:
        for process in (launched, *running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    assert sorted(running) == ["0", "1"]
    return folder


def assert_close_runs(one, two):
    first, second = rows(one), rows(two)
    assert [(row["step"], row["split"], row["tokens"]) for row in first] == [
        (row["step"], row["split"], row["tokens"]) for row in second
    ]
    for key in ("loss", "gradient_norm", "learning_rate"):
        assert [row[key] for row in first if key in row] == pytest.approx(
            [row[key] for row in second if key in row], rel=1e-4
        )


def test_two_processes_give_the_losses_of_one(folder):
    assert_close_runs(folder / "one", folder / "two")


def test_every_process_goes_on_to_the_next_stage_of_a_curriculum(folder, tmp_path):
    train(config_of(dropout=0.0), tmp_path / "staged-one")
    assert_close_runs(tmp_path / "staged-one", folder / "staged-two")
    for split in ("train", "stage"):
        stages = [row["stage"] for row in rows(folder / "staged-two", split)]
        assert stages == [row["stage"] for row in rows(tmp_path / "staged-one", split)]
        assert len(set(stages)) > 1


def test_a_checkpoint_of_one_process_is_continued_by_two(folder):
    assert_close_runs(folder / "one", folder / "begun-by-one")


def test_a_checkpoint_of_two_processes_is_continued_by_one(folder):
    assert list_checkpoints(folder / "begun-by-two" / "checkpoints")[-1].name == "step-6"
    train(tiny_config(batch=17), folder / "begun-by-two")
    assert_close_runs(folder / "one", folder / "begun-by-two")


def test_each_process_keeps_its_own_random_numbers_in_the_checkpoint(folder):
    tensors, scalars = read_checkpoint(list_checkpoints(folder / "two" / "checkpoints")[-1])
    assert scalars["world_size"] == 2
    assert not torch.equal(tensors["rng.cpu.0"], tensors["rng.cpu.1"])


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch, tmp_path):
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert (world_of_environment().rank, world_of_environment().size) == (1, 3)
    with pytest.raises(UserError, match="2 examples cannot be shared by 3 processes"):
        train(tiny_config(batch=2), tmp_path / "run")


def test_what_averages_gradients_is_gone_before_the_processes_part(monkeypatch, tmp_path):
    world, cpu = World(0, 0, 2), torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    model = parallel(torch.nn.Linear(2, 2), world, cpu)
    model(torch.ones(1, 2)).sum().backward()
    reducer = weakref.ref(model.reducer)
    parted = dist.destroy_process_group
    gone = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (gone.append(reducer() is None), parted()))
    leave()
    assert gone == [True]
    assert not dist.is_initialized()
