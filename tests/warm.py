"""Processes that start at once: forks of one that has imported torch and trained once.

A fresh interpreter needs seconds for that, and what these tests are about (signals, kills, locks) needs a process of
its own and not a fresh one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from threading import Thread
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[1]

# For each line on standard input, fork a process that runs its code as `python -c` would. Between the two stands one
# that waits, and writes the exit status when there is one: this process itself has no threads and waits for nobody.
SERVER = """
import json, os, signal, sys, tempfile, traceback
from pathlib import Path

import tests.study.fake_runs, trivium.commands.train, trivium.study.compare, trivium.study.worker
from tests.train.tiny import tiny_config
from trivium.train.loop import train

def run(order):
    os.chdir(order["folder"])
    writing = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, flags in ((0, os.O_RDONLY), (1, writing), (2, writing)):
        os.dup2(os.open(order["streams"][number], flags, 0o644), number)
    os.environ.update(order["environment"])
    sys.stdin = open(0, closefd=False)
    sys.argv = ["-c", *order["arguments"]]
    try:
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

with tempfile.TemporaryDirectory() as folder:
    train(tiny_config(steps=1, warmup=0), Path(folder) / "run")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child == 0:
            status = run(order)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(child, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        Path(order["status"] + ".part").write_text(str(status))
        os.replace(order["status"] + ".part", order["status"])
        os._exit(0)
"""


class Forked:
    """A process that runs; its name among others is `pid`."""

    def __init__(self, pid: int, files: dict[str, Path]):
        self.pid = pid
        self._files = files

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while it runs."""
        return int(self._files["status"].read_text()) if self._files["status"].exists() else None

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """Return the exit status when there is one."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} did not end"
            time.sleep(0.01)
        return status

    @property
    def out(self) -> str:
        """What it has printed."""
        return self._files["out"].read_text()

    @property
    def err(self) -> str:
        """What it has printed to standard error."""
        return self._files["err"].read_text()


class Worker(Forked):
    """A worker of a study, with as much of subprocess.Popen as `trivium.study.jobs` uses."""

    def __init__(self, pid: int, files: dict[str, Path]):
        super().__init__(pid, files)
        # In the order in which the process opens them, or each would wait for the other.
        self.stdin = self._opened("in", "w")
        self.stdout = self._opened("out", "r")

    def _opened(self, name: str, mode: str) -> IO[str]:
        """Open a pipe, which waits for the process to open its end: one that has ended never will."""
        found: list[IO[str]] = []
        opener = Thread(target=lambda: found.append(self._files[name].open(mode, encoding="utf-8")), daemon=True)
        opener.start()
        deadline = time.monotonic() + 60
        while opener.is_alive():
            opener.join(0.05)
            if opener.is_alive() and (self.poll() is not None or time.monotonic() > deadline):
                os.close(os.open(self._files[name], os.O_RDWR))  # the other end, for which the opener waits
                opener.join()
                found[0].close()
                raise ChildProcessError(f"process {self.pid} never opened {name!r}; its status: {self.poll()}")
        return found[0]

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Warm:
    """The process that is forked from."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.number = 0
        assert self._line() == "ready\n"

    def _line(self) -> str:
        stdout: Any = self.process.stdout
        return stdout.readline()

    def start(self, code: str, *arguments: object, environment: dict[str, str] | None = None) -> Forked:
        """Run `code` as `python -c code *arguments` would, with more or other variables of the environment."""
        self.number += 1
        files = {name: self.folder / f"{self.number}.{name}" for name in ("out", "err", "status")}
        streams = [os.devnull, files["out"], files["err"]]
        return Forked(self._fork(code, arguments, files["status"], streams, environment or {}), files)

    def worker(self, command: list[str], *, stderr: IO[bytes], env: dict[str, str], **rest: Any) -> "Worker":
        """Stand in for the subprocess.Popen of `trivium.study.jobs`: a worker of a study, but no lock that it holds."""
        self.number += 1
        files = {name: self.folder / f"{self.number}.{name}" for name in ("in", "out", "status")}
        for name in ("in", "out"):
            os.mkfifo(files[name])
        code = "import sys; from trivium.study.worker import main; main(sys.argv[1])"
        pid = self._fork(code, command[-1:], files["status"], [files["in"], files["out"], stderr.name], env, Path.cwd())
        return Worker(pid, files)

    def _fork(
        self,
        code: str,
        arguments: Iterable[object],
        status: Path,
        streams: list[Any],
        environment: dict[str, str],
        folder: Path = ROOT,
    ) -> int:
        order = {"code": code, "arguments": [str(argument) for argument in arguments], "status": str(status)}
        order |= {"streams": [str(stream) for stream in streams], "environment": environment, "folder": str(folder)}
        stdin: IO[str] | Any = self.process.stdin
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        return int(self._line())

    def close(self) -> None:
        """End the process that is forked from."""
        self.process.communicate(timeout=60)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The process that is forked from, started when the first test asks for it."""
    made = Warm(tmp_path_factory.mktemp("warm"))
    yield made
    made.close()


@pytest.fixture
def warm_workers(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workers of studies start at once."""
    monkeypatch.setattr("trivium.study.jobs.Popen", warm.worker)
