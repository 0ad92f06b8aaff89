"""Time training at GPT-2's size on a GPU: our loop beside transformers' Trainer, compiled, on the same random tokens.

A rate in tokens per second says little without what the machine could do: model FLOPs (forward, and twice that
backward, counting exactly the allowed pairs) stand against a product of 8192^3 matrices in the same run.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from trivium.bench.clock import Clock
from trivium.bench.gates import WrongResult
from trivium.bench.threads import processor_threads
from trivium.bench.train import FIRST, TOLERANCE, Shape, features, gpt2_like, run_trainer
from trivium.config import UserError
from trivium.data.stream import TrainStream
from trivium.evaluate.config import EvaluateConfig
from trivium.mixers.simplicial import SimplicialConfig
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.ops import simplicial_attention
from trivium.ops.vocabulary_loss import vocabulary_loss
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import PROMPT, Batch, Example, Split, Task, TaskConfig, Verdict
from trivium.tasks.counter_random import GOLDEN, key, mix
from trivium.train.config import RunConfig, TrainConfig
from trivium.train.environment import describe_environment
from trivium.train.loop import train

SYMBOLS = 50_257  # GPT-2's
MATRIX = 8192


@dataclass(frozen=True)
class RandomTokensConfig(TaskConfig):
    """Rows of random tokens, every one of which is scored: what a step costs does not depend on what they say."""

    symbols: int = SYMBOLS
    """Symbols of the vocabulary."""
    tokens: int = 1024
    """Tokens that a row's model reads."""

    kind = "random_tokens"

    def build(self) -> "RandomTokens":
        return RandomTokens(self)


class RandomTokens(Task):
    """The problems of RandomTokensConfig: prompts of nearly the whole row, so that an answer is a few tokens."""

    config: RandomTokensConfig

    def __init__(self, config: RandomTokensConfig):
        self.config = config
        self.alphabet = Alphabet((*(f"<{number}>" for number in range(config.symbols - 1)), "<end>"))
        self.max_length = config.tokens + 1

    def _rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """Return ids (B, T + 1), the last of them the end."""
        start_B = key(("train", "validation", "test").index(split)) + np.asarray(indices).astype(np.uint64) * GOLDEN
        words = mix(mix(start_B)[:, None] + np.arange(self.max_length, dtype=np.uint64) * GOLDEN)
        ids = (words % np.uint64(self.config.symbols - 1)).astype(np.int64)
        ids[:, -1] = self.alphabet.end_id
        return ids

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        ids = self._rows(split, np.array([index]))[0]
        return Example(self.alphabet.decode(ids[:-4]), self.alphabet.decode(ids[-4:]))

    def canonical(self, example: Example) -> str:
        return example.prompt

    def verify(self, example: Example, text: str) -> Verdict:
        return Verdict(text == example.answer)

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        ids = self._rows(split, indices)
        rows, tokens = len(ids), self.config.tokens
        return Batch(
            ids[:, :-1],
            ids[:, 1:],
            np.ones((rows, tokens), dtype=np.float32),
            np.full((rows, tokens), PROMPT, dtype=np.uint8),
            np.full(rows, tokens, dtype=np.int64),
            np.full(rows, tokens - 3, dtype=np.int64),
        )


@dataclass(frozen=True)
class LongShape(Shape):
    """A model and a batch of long rows over GPT-2's vocabulary; `layers_text` names the mixers of another model."""

    layers_text: str = ""

    def model(self) -> DecoderConfig:
        config = super().model()
        return replace(config, layers=self.layers_text) if self.layers_text else config


def _shape(name: str, pattern: str = "", **sizes: Any) -> LongShape:
    chosen = {"width": 768, "layers": 12, "heads": 12, "ff_width": 3072, "batch": 32, "steps": 60, "device": "cuda"}
    task: Any = RandomTokensConfig()
    return LongShape(name, task=task, layers_text=pattern, **(chosen | sizes))


HYBRID = "attention(bias=true)*5 + simplicial(bias=true, window1=1024, window2=32)*3"
LONG_SHAPES = {
    "124M": _shape("124M"),
    "hybrid": _shape("hybrid", HYBRID, layers=8),
}


def options_of(shape: LongShape, steps: int, capture: str = "auto") -> TrainConfig:
    """Return how both programs train."""
    return TrainConfig(
        steps=steps,
        batch=shape.batch,
        learning_rate=3e-4,
        precision="bfloat16",
        device=shape.device,
        compile=shape.device == "cuda",
        capture=capture,  # pyright: ignore[reportArgumentType]
        warmup=5,
        eval_every=steps,
        eval_examples=1,
        log_every=FIRST,
        save_every=steps,
        prompt_loss=True,
    )


def run_ours(shape: LongShape, threads: int, steps: int, capture: str = "auto") -> dict[str, Any]:
    """Train with our loop; return tokens per second behind the first steps, and what else the record says."""
    config = RunConfig(
        task=cast(TaskConfig, shape.task),
        model=shape.model(),
        train=options_of(shape, steps, capture),
        evaluate=EvaluateConfig(examples=1),
    )
    gpu = shape.device == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", threads=threads)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((Path(folder) / "run" / "environment.json").read_text())
    seconds = {row["step"]: row["seconds"] for row in rows if row["split"] == "train"}
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    rate = (steps - FIRST) / (seconds[steps] - seconds[FIRST])
    return {
        "steps_per_second": rate,
        "tokens_per_second": rate * shape.batch * cast(Any, shape.task).tokens,
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "first_losses": losses[FIRST],
        "capture": record["capture"],
        "operators": {name: choice["backend"] for name, choice in record["operators"].items()},
    }


def matrix_rate(device: str, matrix: int = MATRIX) -> float:
    """Return the FLOPs per second of a product of two bfloat16 matrices of `matrix` rows."""
    a, b = (torch.randn(matrix, matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * matrix**3 / Clock(device).median(lambda: a @ b)


def training_flops(shape: LongShape) -> float:
    """Return the model's FLOPs per trained token: three times those of the forward pass."""
    config, task = shape.model(), shape.task.build()
    return 3 * config.flops_per_token(model_context(task, config), cast(Any, shape.task).tokens)


def check_losses(shape: LongShape, rows: int = 2) -> dict[str, float]:
    """Return our loss and that of transformers' GPT-2 with the same weights, in float32; WrongResult if they differ."""
    task, config = shape.task.build(), shape.model()
    torch.manual_seed(0)
    ours = config.build(model_context(task, config)).to(shape.device).eval()
    theirs = cast(nn.Module, gpt2_like(ours, shape)).to(shape.device).eval()
    batch = TrainStream(task, rows, 0).batch(0)
    given = {name: tensor.to(shape.device) for name, tensor in features(batch).items()}
    with torch.no_grad():
        x, weight = ours(given["input_ids"], hidden=True)
        targets = given["labels"].flatten()
        mine = float(vocabulary_loss(x.flatten(0, 1), weight, targets, torch.ones_like(targets).float())) / len(targets)
        theirs_loss = float(theirs(**given).loss)
    if not abs(mine - theirs_loss) <= TOLERANCE * abs(theirs_loss):
        raise WrongResult(f"{shape.name}: the first losses differ, {mine} and {theirs_loss}: nothing is timed")
    return {"trivium": mine, "trainer": theirs_loss, "parameters": sum(p.numel() for p in ours.parameters())}


def operator_share(shape: LongShape, step_seconds: float) -> dict[str, Any] | None:
    """Return what 2-simplicial attention takes of a step, timed alone at the step's shape; None without such layers."""
    mixers = [mixer for mixer in shape.model().mixers if isinstance(mixer, SimplicialConfig)]
    if not mixers:
        return None
    tokens, width = cast(Any, shape.task).tokens, shape.width // shape.heads
    size = (shape.batch, tokens, shape.heads, width)
    inputs = [torch.randn(size, device=shape.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(5)]
    windows = {"window1": mixers[0].window1, "window2": mixers[0].window2}
    clock, forms = Clock(shape.device), {"form": mixers[0].form}
    forward = clock.median(lambda: simplicial_attention(*inputs, **windows, **forms))  # pyright: ignore
    o = simplicial_attention(*inputs, **windows, **forms)  # pyright: ignore
    slope = torch.randn_like(o)
    backward = clock.median(lambda: torch.autograd.grad(o, inputs, slope, retain_graph=True))
    seconds = len(mixers) * (forward + backward)
    return {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "layers": len(mixers),
        "share": seconds / step_seconds,
    }


def bench_gpt2(
    name: str, *, repeats: int = 3, threads: int | None = None, steps: int | None = None, trainer: bool = True
) -> dict[str, Any]:
    """Time one of LONG_SHAPES and return {"rows", "matmul_tflops", "environment", ...}.

    Repeats of the two programs alternate; a model that transformers does not have is timed alone. Raises UserError
    without a GPU, and WrongResult if the two models' losses differ.
    """
    shape = LONG_SHAPES[name]
    if not torch.cuda.is_available():
        raise UserError(f"shape: {name} is timed on a CUDA device, and torch sees none")
    steps = steps or shape.steps
    if repeats < 1 or steps <= FIRST:
        raise UserError(f"repeats: expected 1 or more, and steps more than {FIRST}; got {repeats} and {steps}")
    trainer = trainer and not shape.layers_text
    gate = check_losses(shape) if trainer else {}
    rate = matrix_rate(shape.device)
    ours: list[dict[str, Any]] = []
    theirs: list[float] = []
    with processor_threads(threads) as used:
        for repeat in range(repeats):
            order = ["trivium", "trainer"] if trainer else ["trivium"]
            for program in order[:: 1 if repeat % 2 == 0 else -1]:
                if program == "trivium":
                    ours.append(run_ours(shape, used, steps))
                else:
                    theirs.append(run_trainer(shape, "bfloat16", used, steps, torch_compile=True))
    median = sorted(ours, key=lambda run: run["tokens_per_second"])[len(ours) // 2]
    tokens = shape.batch * cast(Any, shape.task).tokens
    flops = training_flops(shape)
    row: dict[str, Any] = {
        "model": shape.name,
        "batch": shape.batch,
        "row": "both bfloat16" if trainer else "bfloat16",
        **median,
        "trivium": median["steps_per_second"],
        "trivium_repeats": [run["tokens_per_second"] for run in ours],
        "flops_per_token": flops,
        "utilisation": flops * median["tokens_per_second"] / rate,
        "note": f"{median['tokens_per_second']:,.0f} tokens/s, {flops * median['tokens_per_second'] / rate:.0%} of a "
        f"product's {rate / 1e12:.0f} TFLOPS",
    }
    if trainer:
        middle = sorted(theirs)[len(theirs) // 2]
        row |= {
            "trainer": middle,
            "ratio": median["steps_per_second"] / middle,
            "trainer_tokens_per_second": middle * tokens,
            "trainer_repeats": [each * tokens for each in theirs],
        }
    share = operator_share(shape, 1 / median["steps_per_second"])
    if share is not None:
        row["simplicial"] = share
        row["note"] += f"; 2-simplicial attention {share['share']:.0%} of the step"
    return {
        "benchmark": "train",
        "environment": {**describe_environment(torch.device(shape.device)), "transformers": version("transformers")},
        "threads": used,
        "repeats": repeats,
        "unit": "steps/s, median of the repeats",
        "gates": {name: gate},
        "matmul_tflops": rate / 1e12,
        "rows": [row],
    }
