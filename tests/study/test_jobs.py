import os

import pytest

from tests.study.fake_runs import CRASH_SEED, DEATH_SEED, USER_ERROR_SEED
from trivium.config import UserError, from_dict
from trivium.study import jobs as jobs_module
from trivium.study.jobs import Job, Plan, Workers, available_cores, plan
from trivium.train.config import RunConfig

FAKE = "tests.study.fake_runs:train"


def job(folder, seed):
    config = {"task": {"kind": "addition"}, "train": {"seed": seed, "steps": 100}}
    return Job(from_dict(RunConfig, config), folder / f"run-s{seed}")


def test_runs_go_side_by_side_and_what_fails_does_not_stop_the_others(warm_workers, tmp_path):
    jobs = [job(tmp_path, seed) for seed in (0, USER_ERROR_SEED, CRASH_SEED, 1, 2)]
    events = []
    with Workers(Plan(jobs=2, threads=1), tmp_path / "workers.log", target=FAKE) as workers:
        outcomes = workers.run(jobs, events.append)
        again = workers.run([job(tmp_path, 3)], events.append)
    finished = {name for name, failure in outcomes.items() if failure is None}
    assert finished == {"run-s0", "run-s1", "run-s2"}
    assert again == {"run-s3": None}
    failures = {name: failure.message for name, failure in outcomes.items() if failure is not None}
    assert failures[f"run-s{USER_ERROR_SEED}"] == "train.batch: that will not do"
    assert failures[f"run-s{CRASH_SEED}"] == "RuntimeError: the sky fell"
    assert "the sky fell" in (tmp_path / "workers.log").read_text()
    calls = [(tmp_path / entry.name / "calls.log").read_text().split() for entry in jobs]
    assert len({process for process, _, _ in calls}) <= 2
    assert all((threads, environment) == ("1", "1") for _, threads, environment in calls)
    kinds = [event.kind for event in events if event.run == "run-s0"]
    assert kinds == ["started", "progress", "finished"]
    progress = next(event.progress for event in events if event.kind == "progress")
    assert (progress["step"], progress["steps"], progress["exact_match"]) == (1, 10, None)


def test_another_worker_takes_the_place_of_one_that_died(warm_workers, tmp_path):
    with Workers(Plan(jobs=1, threads=1), tmp_path / "workers.log", target=FAKE) as workers:
        outcomes = workers.run([job(tmp_path, DEATH_SEED), job(tmp_path, 0)], lambda event: None)
    failure = outcomes[f"run-s{DEATH_SEED}"]
    assert failure is not None
    assert "SIGKILL" in failure.message
    assert outcomes["run-s0"] is None


def test_a_worker_that_cannot_start_says_where_its_words_are(warm_workers, tmp_path):
    with (
        Workers(Plan(jobs=1, threads=1), tmp_path / "workers.log", target="trivium.absent:train") as workers,
        pytest.raises(RuntimeError, match=r"could not start .*workers\.log"),
    ):
        workers.run([job(tmp_path, 0)], lambda event: None)
    assert "No module named 'trivium.absent'" in (tmp_path / "workers.log").read_text()


def test_tiny_models_get_a_core_each_and_large_ones_more(monkeypatch):
    monkeypatch.setattr(jobs_module, "available_cores", lambda: 8)
    assert plan(12, parameters=1e5, device="cpu") == Plan(jobs=8, threads=1)
    assert plan(3, parameters=1e5, device="cpu") == Plan(jobs=3, threads=2)
    assert plan(12, parameters=1e8, device="cpu") == Plan(jobs=2, threads=4)
    assert plan(12, parameters=1e5, device="cpu", jobs=4) == Plan(jobs=4, threads=2)
    assert plan(12, parameters=1e5, device="cpu", threads=4) == Plan(jobs=2, threads=4)


def test_each_cuda_device_gets_one_run(monkeypatch):
    monkeypatch.setattr(jobs_module, "available_cores", lambda: 8)
    monkeypatch.setattr(jobs_module, "_cuda_devices", lambda device: ("0", "1"))
    assert plan(12, parameters=1e5) == Plan(jobs=2, threads=4, devices=("0", "1"))


def test_no_jobs_at_all_is_the_users_mistake():
    with pytest.raises(UserError, match="jobs: expected a whole number from 1 on, got 0"):
        plan(12, parameters=1e5, device="cpu", jobs=0)


def test_no_more_cores_are_used_than_this_process_may():
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


def test_a_stand_in_that_ends_before_it_opens_its_pipes_is_an_error_and_no_wait(warm, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.warm.Path.cwd", lambda: tmp_path / "missing")
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(ChildProcessError, match="never opened 'in'; its status: 1"),
    ):
        warm.worker(["python", "nothing"], stderr=log, env={})
