"""Run folders as training leaves them, made in no time: for the rooms that only read them."""

import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from trivium.config import UserError, to_yaml
from trivium.train.config import RunConfig
from trivium.train.stop import Interrupted

# Seeds that make the stand-in for training misbehave.
USER_ERROR_SEED, CRASH_SEED, DEATH_SEED, SLOW_SEED = 101, 102, 103, 104


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int
    tokens: int
    loss: float
    exact_match: float | None
    tokens_per_second: float
    seconds_left: float


def train(config: RunConfig, folder: Path, *, on_progress, threads: int) -> dict:
    """Stand in for trivium.train.loop.train: the same call, folder and errors, without a model."""
    folder.mkdir(parents=True, exist_ok=True)
    seed = config.train.seed
    with (folder / "calls.log").open("a") as log:
        log.write(f"{os.getpid()} {threads} {os.environ['OMP_NUM_THREADS']}\n")
    on_progress(Progress(1, 10, 100, 2.5, None, 1000.0, 3.0))
    if seed == USER_ERROR_SEED:
        raise UserError("train.batch: that will not do")
    if seed == CRASH_SEED:
        raise RuntimeError("the sky fell")
    if seed == DEATH_SEED:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == SLOW_SEED and not (folder / "checkpoint").exists():
        heard = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        while not heard:
            time.sleep(0.02)
        signal.signal(signal.SIGTERM, before)
        (folder / "checkpoint").write_text("1")
        raise Interrupted("interrupted by SIGTERM after step 1", 1, folder / "checkpoint")
    speed = 1.5 if "simplicial" in folder.name else 1.0
    if config.train.learning_rate > 0.01:
        speed = 0.3
    write_run(folder, config, speed=speed)
    return {}


def write_run(folder: Path, config: RunConfig, *, speed: float = 1.0, steps: int = 600, every: int = 50) -> None:
    """Write a finished run that learns `speed` times as fast as the slowest, a little differently for each seed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    seed = config.train.seed
    rows = []
    match = loss = 0.0
    for step in range(every, steps + 1, every):
        tokens = step * (2900 + seed % 7)
        progress = speed * step / (200 + 12 * (seed % 5))
        match = 1 / (1 + math.exp(-6 * (progress - 1.2)))
        match = round(min(1.0, match * 1.002), 4)
        loss = 1.6 * math.exp(-2 * progress) + 0.002
        common = {"step": step, "tokens": tokens, "examples": step * 256}
        training = {"learning_rate": 1e-3, "gradient_norm": 1.0, "seconds": step / 60, "tokens_per_second": 2e5}
        rows.append({**common, "split": "train", "loss": loss * 1.05, **training})
        scores = {"loss": loss, "token_accuracy": match, "exact_match": match, "count": 512}
        rows.append({**common, "split": "validation", **scores})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {
        "python": "3.11.2",
        "torch": "2.13.0",
        "processor": "a processor",
        "command": "trivium compare recipes/quickstart.yaml",
        "operators": {"simplicial": {"backend": "torch", "reason": "no GPU"}},
        "seed": seed,
        "threads": 1,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    right = {
        "prompt": "99+12=",
        "generated": "021<end>",
        "wanted": "021<end>",
        "correct": True,
        "reason": "",
        "tags": {},
    }
    wrong = {**right, "generated": "<b>1</b>21<end>", "correct": False, "reason": "the answer is 120, not 121"}
    rate = {"rate": match, "low": match - 0.01, "high": min(1.0, match + 0.01), "successes": 1, "n": 1000}
    result = {
        "status": "finished",
        "step": steps,
        "tokens": rows[-1]["tokens"],
        "examples": steps * 256,
        "seconds": 11.0,
        "tokens_per_second": 150_000.0 + 1000 * seed,
        "parameters": 100_000,
        "flops_per_token": 200_000.0,
        "state_bytes": 6656,
        "precision": "bfloat16",
        "threads": 1,
        "device": "cpu",
        "train_loss": loss,
        "validation": {"loss": loss, "token_accuracy": match, "exact_match": match, "count": 512},
        "evaluation": {
            "split": "test",
            "exact_match": rate,
            "token_accuracy": match,
            "generated_tokens_per_problem": 4.2,
            "by_tag": {"digits": {str(digits): {**rate, "n": 100 * digits} for digits in (1, 2, 3)}},
            "samples": {"right": [right] * 3, "wrong": [wrong] * 2},
        },
    }
    (folder / "result.json").write_text(json.dumps(result))
