"""Run many trainings side by side, each in a worker process that lives as long as the study."""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from types import TracebackType
from typing import IO, Any, Literal, Self

from trivium.config import UserError, to_dict
from trivium.train.config import RunConfig

TRAIN = "trivium.train.loop:train"
SECONDS_TO_STOP = 60.0
LARGE_MODEL = 5_000_000


@dataclass(frozen=True)
class Job:
    """A run to train: its folder's name is its name everywhere."""

    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self.folder.name


@dataclass(frozen=True)
class Event:
    """What happened to a run. `kept` means that an earlier session had finished it."""

    kind: Literal["kept", "started", "progress", "finished", "failed", "stopped"]
    run: str
    progress: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a run did not finish; `diverged` when its loss was not finite."""

    message: str
    diverged: bool = False


@dataclass(frozen=True)
class Plan:
    """How a study uses the machine: runs side by side, threads of each, and the devices they take in turn."""

    jobs: int
    threads: int
    devices: tuple[str, ...] = ()


def available_cores() -> int:
    """Return the processor cores that this process may use, a container's quota included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def check_jobs(jobs: int | None) -> None:
    """Raise UserError for a number of runs side by side that there cannot be; None is none given."""
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs: expected a whole number from 1 on, got {jobs}")


def plan(runs: int, *, parameters: float, device: str = "auto", jobs: int | None = None, threads: int | None = None):
    """Return the Plan for `runs` runs of models of up to `parameters`; `jobs` and `threads` are kept when given.

    A tiny model gains nothing from a second thread, so it gets one core; a large one gets up to four. On CUDA there
    is one run a device at a time, unless `jobs` asks for more.
    """
    check_jobs(jobs)
    cores = available_cores()
    devices = _cuda_devices(device)
    if jobs is None:
        each = threads or (1 if parameters < LARGE_MODEL else min(4, cores))
        jobs = len(devices) or max(1, cores // each)
    jobs = max(1, min(jobs, runs))
    return Plan(jobs, threads or max(1, cores // jobs), devices)


def _cuda_devices(device: str) -> tuple[str, ...]:
    if device == "cpu":
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if device in ("auto", "cuda"):
        return tuple(names)
    return (names[int(device.removeprefix("cuda:"))],) if device.startswith("cuda:") else ()


class Workers:
    """Worker processes to train jobs with; a context manager that ends them.

    `keep_open` are file descriptors that the workers inherit: a lock held through them lasts until the last worker
    has ended, even when this process is killed. What workers print goes to the file `log`.
    """

    def __init__(self, plan: Plan, log: Path, *, keep_open: Sequence[int] = (), target: str = TRAIN):
        self.plan = plan
        self.log = log
        self.keep_open = tuple(keep_open)
        self.target = target
        self._messages: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._end(interrupted=error is not None)

    def run(
        self, jobs: Sequence[Job], on_event: Callable[[Event], None], side_by_side: int | None = None
    ) -> dict[str, "Failure | None"]:
        """Train `jobs` and return what went wrong with each by name, None for those that finished.

        No more than `side_by_side` of them go at a time (default: as the plan says, which is the most).
        KeyboardInterrupt (also raised here for SIGTERM) leaves workers to be stopped by the context's end: each
        writes its checkpoint first.
        """
        waiting = deque(jobs)
        outcomes: dict[str, Failure | None] = {}
        most = min(self.plan.jobs, side_by_side or self.plan.jobs)
        self._share(waiting, most)
        with _sigterm_interrupts():
            while len(outcomes) < len(jobs):
                self._fill(min(most, len(jobs) - len(outcomes)))
                worker, message = self._receive()
                if message is None:
                    self._bury(worker, outcomes, on_event)
                elif message["event"] == "ready":
                    worker.ready = True
                elif message["event"] in ("started", "progress"):
                    on_event(Event(message["event"], message["id"], message.get("progress", {})))
                elif message["event"] in ("finished", "failed"):
                    worker.job = None
                    failed = message["event"] == "failed"
                    outcomes[message["id"]] = (
                        Failure(message["error"], message.get("diverged", False)) if failed else None
                    )
                    on_event(Event(message["event"], message["id"], message=message.get("error", "")))
                else:
                    worker.stopped = message.get("error") or "it was asked to stop"
                self._share(waiting, most)
        return outcomes

    def _share(self, waiting: deque[Job], most: int) -> None:
        """Give what waits to workers that have nothing to do, until `most` of them have."""
        busy = sum(worker.job is not None for worker in self._workers)
        for worker in self._workers:
            if waiting and busy < most and worker.ready and worker.job is None:
                worker.give(waiting.popleft(), self.plan.threads)
                busy += 1

    def _fill(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            taken = [worker.device for worker in self._workers]
            device = min(self.plan.devices, key=taken.count) if self.plan.devices else None
            self._workers.append(_Worker(self, device, self._messages))

    def _receive(self) -> "tuple[_Worker, dict[str, Any] | None]":
        while True:
            try:
                return self._messages.get(timeout=1.0)
            except queue.Empty:
                continue

    def _bury(self, worker: "_Worker", outcomes: dict[str, Failure | None], on_event: Callable[[Event], None]) -> None:
        self._workers.remove(worker)
        status = worker.process.wait()
        worker.end(interrupted=False)
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        if worker.job is None:
            if worker.ready:
                return
            raise RuntimeError(f"a worker could not start ({how}); {self.log} has what it printed")
        reason = worker.stopped or f"its process ended with {how}; {self.log} has what it printed"
        outcomes[worker.job.name] = Failure(reason)
        on_event(Event("stopped" if worker.stopped else "failed", worker.job.name, message=reason))

    def _end(self, interrupted: bool) -> None:
        for worker in self._workers:
            worker.end(interrupted)
        deadline = time.monotonic() + SECONDS_TO_STOP
        try:
            for worker in self._workers:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        except (TimeoutExpired, KeyboardInterrupt):
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()
        for worker in self._workers:
            worker.reader.join()
        self._workers.clear()


class _Worker:
    """One worker process, the thread that reads its messages, and the job that it has."""

    def __init__(self, owner: Workers, device: str | None, messages: queue.SimpleQueue[Any]):
        self.ready = False
        self.stopped = ""
        self.job: Job | None = None
        self.device = device
        environment = {**os.environ, "OMP_NUM_THREADS": str(owner.plan.threads)}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with owner.log.open("ab") as log:
            # A process group of its own keeps the terminal's Ctrl-C from reaching it twice. -P keeps files of the
            # current folder from being imported in place of ours.
            self.process = Popen(
                [sys.executable, "-P", "-m", "trivium.study.worker", owner.target],
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                env=environment,
                pass_fds=owner.keep_open,
                process_group=0,
                text=True,
                encoding="utf-8",
            )
        self.reader = threading.Thread(target=self._read, args=(messages,), daemon=True)
        self.reader.start()

    def give(self, job: Job, threads: int) -> None:
        """Send `job`; a worker that has died meanwhile is found by its reader."""
        self.job = job
        config = to_dict(job.config)
        if self.device is not None:
            config["train"]["device"] = "cuda"
        message = {"id": job.name, "config": config, "folder": str(job.folder), "threads": threads, "command": sys.argv}
        try:
            stdin = _stream(self.process.stdin)
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        except BrokenPipeError:
            return

    def end(self, interrupted: bool) -> None:
        """Ask the process to end: at once when idle, after its checkpoint when it trains."""
        if interrupted:
            self.process.terminate()
        try:
            _stream(self.process.stdin).close()
        except BrokenPipeError:
            return

    def _read(self, messages: queue.SimpleQueue[Any]) -> None:
        with _stream(self.process.stdout) as stdout:
            for line in stdout:
                messages.put((self, json.loads(line)))
        messages.put((self, None))


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, where signals can be handled (the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
