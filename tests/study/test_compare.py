import dataclasses
import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.study.fake_runs import CRASH_SEED, SLOW_SEED
from trivium.config import UserError, from_dict, to_dict
from trivium.ops import dispatch
from trivium.study.compare import compare
from trivium.study.jobs import Plan, Workers
from trivium.study.recipe import Recipe

FAKE = "tests.study.fake_runs:train"


class SharedWorkers:
    """Stands in for Workers with those of the module: processes as ever, but not started anew for each study."""

    def __init__(self, workers, plan, target):
        assert (plan.jobs, target) == (1, FAKE)
        self.workers = workers
        workers.plan = plan

    def __enter__(self):
        return self.workers

    def __exit__(self, *error):
        assert all(worker.job is None for worker in self.workers._workers)


@pytest.fixture(scope="module")
def workers(warm, tmp_path_factory):
    with (
        pytest.MonkeyPatch.context() as patch,
        Workers(Plan(jobs=1, threads=1), tmp_path_factory.mktemp("workers") / "workers.log", target=FAKE) as workers,
    ):
        patch.setattr("trivium.study.jobs.Popen", warm.worker)
        yield workers


@pytest.fixture
def shared_worker(workers, monkeypatch):
    """Let studies of one test run in the worker of the test before, since starting one takes seconds."""
    monkeypatch.setattr(
        "trivium.study.compare.Workers",
        lambda plan, log, *, keep_open, target: SharedWorkers(workers, plan, target),
    )


def recipe_of(seeds, **compare):
    return from_dict(
        Recipe,
        {
            "name": "study",
            "task": {"kind": "addition", "format": "reversed", "max_digits": 2},
            "model": {"width": 16, "heads": 2, "positions": "block"},
            "train": {"steps": 4, "batch": 8, "eval_every": 2, "eval_examples": 8, "device": "cpu"},
            "evaluate": {"examples": 10, "samples": 2},
            "compare": {
                "seeds": seeds,
                "variants": {
                    "attention": {"model.layers": "attention*2"},
                    "local": {"model.layers": "attention*1 + attention(window=2)*1"},
                },
                **compare,
            },
        },
    )


def calls(folder):
    return sum(len(log.read_text().splitlines()) for log in folder.glob("*/calls.log"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "toaster"}, "train.device: 'toaster' is not a device"),
        ({"device": "cuda:99"}, "train.device: 'cuda:99' was asked for, this machine has"),
        ({"epochs": 2, "steps": None}, "train.epochs: this task's problems never run out"),
        ({"batch": None, "batch_tokens": 4}, "train.batch_tokens: 4 is less than the"),
    ],
)
def test_what_no_run_could_be_trained_with_is_refused_before_the_first(tmp_path, change, message):
    recipe = recipe_of([0])
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **change))
    with pytest.raises(UserError, match=message):
        compare(recipe, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_variant_that_names_a_missing_backend_is_refused_before_the_first_run(tmp_path, monkeypatch):
    missing = dispatch.Backend(lambda: pytest.fail("called"), missing=lambda: "no such machine")
    monkeypatch.setitem(dispatch._registered["simplicial"], "triton", missing)
    variants = {"two": {"model.layers": "simplicial*1", "model.backends": {"simplicial": "triton"}}}
    recipe = recipe_of([0], variants={**variants, "one": {"model.layers": "attention*1"}}, match="none")
    with pytest.raises(UserError, match=r"compare.variants.two: operator simplicial: .* is missing: no such machine"):
        compare(recipe, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_study_under_torchrun_is_refused_since_its_workers_would_wait_for_one_another(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        compare(recipe_of([0]), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_study_of_real_runs_leaves_results_and_a_report(tmp_path):
    recipe = recipe_of([0])
    results = compare(
        recipe, tmp_path, jobs=1, command=["/somewhere/bin/trivium", "compare", "r.yaml", "--runs", "a b"]
    )
    folder = tmp_path / recipe.folder_name
    assert results["status"] == "finished"
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["command"] == "trivium compare r.yaml --runs 'a b'"
    assert results["environment"]["torch"]
    assert results["environment"]["differs"] == {}
    for variant in results["variants"].values():
        run = variant["seeds"]["0"]
        assert run["curve"]["step"] == [2, 4]
        assert run["exact_match"]["n"] == 10
        assert len(variant["samples"]["wrong"]) <= 2
        assert (folder / run["run"] / "model").is_dir()
    page = (folder / "report.html").read_text()
    assert "trivium compare r.yaml --runs" in page
    assert "local" in page


def test_a_finished_study_is_not_trained_again_and_a_failed_run_is(shared_worker, tmp_path):
    recipe = recipe_of([0, CRASH_SEED])
    folder = tmp_path / recipe.folder_name
    events = []
    results = compare(recipe, tmp_path, jobs=1, target=FAKE)
    assert results["status"] == "failed"
    assert [(failure["variant"], failure["seed"]) for failure in results["failed"]] == [
        ("attention", CRASH_SEED),
        ("local", CRASH_SEED),
    ]
    assert results["failed"][0]["error"] == "RuntimeError: the sky fell"
    assert calls(folder) == 4
    compare(recipe, tmp_path, jobs=1, target=FAKE, on_progress=events.append)
    assert calls(folder) == 6
    assert [event.kind for event in events if "-s0-" in event.run] == ["kept", "kept"]


def test_some_variants_now_and_the_others_later_are_one_study(shared_worker, tmp_path):
    recipe = recipe_of([0, 1], learning_rates=[1e-3, 3e-3])
    folder = tmp_path / recipe.folder_name
    results = compare(recipe, tmp_path, jobs=1, target=FAKE, only=["attention"])
    assert (results["status"], results["not_run"]) == ("partial", ["local"])
    assert calls(folder) == 4
    assert results["variants"]["local"]["exact_match"]["mean"] is None
    assert results["variants"]["local"]["tuning"] == []
    assert "Not run: local." in (folder / "report.html").read_text()
    results = compare(recipe, tmp_path, jobs=1, target=FAKE, only=["local"])
    assert (results["status"], results["not_run"]) == ("finished", [])
    assert calls(folder) == 8
    assert len(results["variants"]["attention"]["seeds"]) == 2
    with pytest.raises(UserError, match="only: no variant 'lokal'; did you mean 'local'"):
        compare(recipe, tmp_path, jobs=1, target=FAKE, only=["lokal"])


def test_a_disk_that_is_full_when_the_results_are_written_keeps_the_earlier_ones(shared_worker, tmp_path, monkeypatch):
    recipe = recipe_of([0])
    folder = tmp_path / recipe.folder_name
    compare(recipe, tmp_path, jobs=1, target=FAKE)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def half(path, content):
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("trivium.report.storage.write_synced", half)
        with pytest.raises(OSError, match="No space left"):
            compare(recipe, tmp_path, jobs=1, target=FAKE)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after.get(path)} <= {"study.lock"}
    assert after.keys() == before.keys()
    assert compare(recipe, tmp_path, jobs=1, target=FAKE)["status"] == "finished"
    assert calls(folder) == 2


def test_the_run_that_is_offered_for_a_talk_is_one_that_finished(shared_worker, tmp_path, capsys):
    from trivium.commands.compare import show

    recipe = recipe_of([CRASH_SEED, 0])
    show(compare(recipe, tmp_path, jobs=1, target=FAKE), tmp_path / recipe.folder_name)
    offered = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("try it:")]
    assert [Path(run).name.split("-")[1] for run in offered] == ["s0"]


def test_every_variant_is_tuned_on_the_same_grid_and_takes_its_best(shared_worker, tmp_path):
    recipe = recipe_of([0], learning_rates=[1e-3, 3e-3, 3e-2], tuning_seeds=[7])
    results = compare(recipe, tmp_path, jobs=1, target=FAKE)
    for variant in results["variants"].values():
        assert [row["learning_rate"] for row in variant["tuning"]] == [1e-3, 3e-3, 3e-2]
        # The stand-in learns alike at the two lower rates; the first of equals is taken.
        assert [row["chosen"] for row in variant["tuning"]] == [True, False, False]
        assert variant["learning_rate"] == 1e-3
        assert list(variant["seeds"]) == ["0"]
    assert calls(tmp_path / recipe.folder_name) == 2 * 3 + 2


def start(warm, tmp_path, recipe):
    """Start a study in a process of its own, and wait until its first run trains."""
    code = (
        "import json, sys; from trivium.config import from_dict; from trivium.study.recipe import Recipe;"
        "from trivium.study.compare import compare;"
        f"compare(from_dict(Recipe, json.loads(sys.argv[1])), {str(tmp_path)!r}, jobs=1, target={FAKE!r})"
    )
    process = warm.start(code, json.dumps(to_dict(recipe)))
    folder = tmp_path / recipe.folder_name
    deadline = time.monotonic() + 120
    while True:
        runs = folder.glob(f"*-s{SLOW_SEED}-*")
        slow = [run / "calls.log" for run in runs if not (run / "checkpoint").exists() and (run / "calls.log").exists()]
        if slow and (words := slow[0].read_text().split()):
            return process, folder, int(words[0])
        assert process.poll() is None, process.err
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_end(process_id):
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process_id}/stat").exists():
        if Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        assert time.monotonic() < deadline, "the worker outlived its study"
        time.sleep(0.05)


def test_a_stopped_study_writes_checkpoints_and_the_same_command_continues_it(warm, shared_worker, tmp_path):
    recipe = recipe_of([0, SLOW_SEED])
    process, folder, worker = start(warm, tmp_path, recipe)
    process.send_signal(signal.SIGTERM)
    assert process.wait() not in (0, -signal.SIGTERM)
    assert "the same command continues" in process.err
    wait_for_end(worker)
    assert len(list(folder.glob("*/checkpoint"))) == 1
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert results["variants"]["local"]["seeds"]["0"]["status"] == "finished"

    # Killed outright this time: the worker must find that out by itself, and the lock must not outlive it.
    process, folder, worker = start(warm, tmp_path, recipe)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_end(worker)
    assert len(list(folder.glob("*/checkpoint"))) == 2

    results = compare(recipe, tmp_path, jobs=1, target=FAKE)
    assert results["status"] == "finished"
    # Each run of the first seed was trained once, each slow one was continued once.
    assert calls(folder) == 2 + 4


def test_two_processes_do_not_run_one_study(tmp_path):
    recipe = recipe_of([0])
    folder = tmp_path / recipe.folder_name
    folder.mkdir()
    code = (
        "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.flock(f, fcntl.LOCK_EX);"
        "os.pwrite(f, str(os.getpid()).encode(), 0); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "study.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another process .id {other.pid}. is running this study"):
            compare(recipe, tmp_path, jobs=1, target=FAKE)
        other.communicate()


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        compare(recipe_of([0]), tmp_path / "file", jobs=1, target=FAKE)


def test_a_continued_study_keeps_its_threads(tmp_path):
    recipe = recipe_of([0])
    folder = tmp_path / recipe.folder_name
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"schema": 1, "threads": 2}))
    from dataclasses import replace

    other = replace(recipe, train=replace(recipe.train, threads=1))
    with pytest.raises(UserError, match=r"train\.threads: .* was begun with 2 threads a run, and 1 are asked for"):
        compare(other, tmp_path, jobs=1, target=FAKE)
