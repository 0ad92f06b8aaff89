"""Time our training on a GPU beside transformers' Trainer and its model, compiled, in a bare loop."""

import time
from typing import Any, cast

import torch
from torch import nn

from trivium.bench.train import FIRST, Cell, Shape, features, gpt2_like, run_trainer, run_trivium, training
from trivium.data.stream import TrainStream
from trivium.model.context import model_context
from trivium.train.schedule import learning_rate

PEER_STEPS = {"trainer": 50, "loop": 150}  # behind the first ones


def time_on_gpu(shape: Shape, repeats: int, threads: int, steps: int) -> dict[str, Any]:
    """Return the row of `shape`, all programs in bfloat16; repeats of the programs alternate."""
    cells = {name: Cell(name, shape.name, "bfloat16") for name in ("trivium", "trainer", "loop")}
    for repeat in range(repeats):
        for name in list(cells)[:: 1 if repeat % 2 == 0 else -1]:
            if name == "trivium":
                rate = run_trivium(shape, "bfloat16", threads, steps)
            elif name == "trainer":
                rate = run_trainer(shape, "bfloat16", threads, FIRST + PEER_STEPS[name])
            else:
                rate = run_loop(shape, FIRST + PEER_STEPS[name])
            cells[name].steps_per_second.append(rate)
    ours, trainer, loop = (cells[name] for name in ("trivium", "trainer", "loop"))
    return {
        "model": shape.name,
        "batch": shape.batch,
        "row": "both bfloat16",
        "trivium": ours.median,
        "trainer": trainer.median,
        "ratio": ours.median / trainer.median,
        "loop": loop.median,
        "ratio_to_loop": ours.median / loop.median,
        "trivium_repeats": ours.steps_per_second,
        "trainer_repeats": trainer.steps_per_second,
        "loop_repeats": loop.steps_per_second,
        "note": f"transformers' model, compiled, in a bare loop: {loop.median:.1f}, ratio "
        f"{ours.median / loop.median:.2f}",
    }


def run_loop(shape: Shape, steps: int) -> float:
    """Train transformers' model, compiled, in the shortest loop there is, and return its steps per second."""
    options = training(shape, "bfloat16", steps)
    task, config = shape.task.build(), shape.model()
    torch.manual_seed(0)
    model = cast(nn.Module, gpt2_like(config.build(model_context(task, config)), shape))
    model = model.to(shape.device).train()
    compiled: Any = torch.compile(model)
    betas = (options.beta1, options.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=options.weight_decay, fused=True)
    stream = TrainStream(task, shape.batch, options.seed)
    began = 0.0
    for step in range(steps):
        if step == FIRST:
            _wait(shape.device)
            began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, step / steps)
        drawn = features(stream.batch(step))
        if shape.device == "cuda":
            drawn = {name: x.pin_memory() for name, x in drawn.items()}
        batch = {name: x.to(shape.device, non_blocking=True) for name, x in drawn.items()}
        with torch.autocast(shape.device, dtype=torch.bfloat16):
            loss = compiled(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _wait(shape.device)
    return (steps - FIRST) / (time.perf_counter() - began)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
