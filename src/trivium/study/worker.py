"""A worker process of a study: takes runs as JSON lines on standard input, answers with JSON lines on standard output.

It lives for the whole study, so that importing torch is paid once. When its standard input closes, its parent has
finished or died: it then ends, and a run that is under way writes its checkpoint first.
"""

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trivium.config import UserError, from_dict
from trivium.train.config import RunConfig
from trivium.train.stop import Interrupted, TrainingDiverged, TrainingStopped

SECONDS_TO_CHECKPOINT = 60.0


def main(target: str) -> None:
    """Serve runs with the function named `target` ("module:function") until standard input closes."""
    # What a library prints must not get among the messages, so they have a file of their own.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    busy, orphaned = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(jobs, busy, orphaned), daemon=True).start()
    module, _, name = target.partition(":")
    train = getattr(importlib.import_module(module), name)
    _send(messages, {"event": "ready"})
    while (job := jobs.get()) is not None:
        # Set before the question, as _listen does it the other way round: one of the two sees the other.
        busy.set()
        if orphaned.is_set():
            return
        _serve(train, job, messages)
        busy.clear()


def _listen(jobs: "queue.SimpleQueue[dict[str, Any] | None]", busy: threading.Event, orphaned: threading.Event) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    orphaned.set()
    jobs.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_CHECKPOINT)
    os._exit(1)


def _serve(train: Callable[..., Any], job: dict[str, Any], messages: Any) -> None:
    def on_progress(progress: Any) -> None:
        _send(messages, {"event": "progress", "id": job["id"], "progress": asdict(progress)})

    _send(messages, {"event": "started", "id": job["id"]})
    try:
        sys.argv = job["command"]  # what the run's record says of how it was started
        config = from_dict(RunConfig, job["config"])
        train(config, Path(job["folder"]), on_progress=on_progress, threads=job["threads"])
    except (Interrupted, KeyboardInterrupt) as error:
        _send(messages, {"event": "stopped", "id": job["id"], "error": str(error)})
        # Who asks a run to stop means the worker.
        sys.exit(0)
    except TrainingDiverged as error:
        _send(messages, {"event": "failed", "id": job["id"], "error": str(error), "diverged": True})
    except (UserError, TrainingStopped) as error:
        _send(messages, {"event": "failed", "id": job["id"], "error": str(error)})
    except Exception as error:
        _send(messages, {"event": "failed", "id": job["id"], "error": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
    else:
        _send(messages, {"event": "finished", "id": job["id"]})


def _send(messages: Any, message: dict[str, Any]) -> None:
    try:
        print(json.dumps(message), file=messages, flush=True)
    except BrokenPipeError:
        # The parent has died; _listen sees that too and ends this process when the checkpoint is written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), messages.fileno())


if __name__ == "__main__":
    main(sys.argv[1])
