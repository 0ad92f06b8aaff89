"""Time one generated token against its position: what each mixer's memory of a long past costs.

A model first reads up to each mark, several tokens at a time, through its streaming state; then single-token steps are
timed there, each the choice of the most probable token and its reading. On a CUDA device a step replays a captured
graph. Steps at which a prefix scan merges chunks are kept apart, and the one with the most merges is timed by itself.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from trivium.bench.latency_models import TimedModel
from trivium.bench.memory import memory_now, memory_peak, wait
from trivium.bench.threads import processor_threads
from trivium.generate.captured import DecodeSteps
from trivium.generate.engine import longest_input
from trivium.model.prefix_scan import PrefixScanConfig
from trivium.ops import dispatch
from trivium.registry import UserError

MARKS = (1_000, 2_000, 5_000, 10_000, 20_000, 40_000)
ClockKind = Literal["wall", "processor"]
WARM = 4  # untimed steps before those that count
WORST_REPEATS = 9


def room_for(marks: Sequence[int], steps: int) -> int:
    """Return the tokens that a model must be able to read."""
    return max(marks) + max(steps, 256) + WARM


def bench_latency(
    models: Sequence[TimedModel],
    marks: Sequence[int] = MARKS,
    *,
    steps: int = 64,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    clock: ClockKind = "wall",
    on_progress: Callable[[str], None] = lambda line: None,
    on_row: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Return {"marks", "steps", "batch", "device", "precision", "threads", "rows", "not_timed"}; a row is one model.

    A row holds "parameters", "layers", "peak_bytes" (weights, state and work, of the process or the device's
    allocator, above what was there), "weights" ("random" or the run's folder) and "points": for each mark "position",
    "milliseconds" {"median", "p10", "p90", "count"} of the steps outside of boundaries, "boundary" (those at one, or
    None) and "state_bytes", all for the whole batch. "ratio" is the median at the last mark over that at the first;
    "worst" the milliseconds of the step with the most merges up to the last mark, None for models without boundaries.
    On a busy machine `clock` "processor" times what one thread computed. A model that can read fewer tokens than a
    mark asks for has no point there. `on_row` is told the results so far after each model, the others named in
    "not_timed". Raises UserError for marks or sizes that cannot be.
    """
    if not marks or min(marks) < 1 or steps < 1 or batch < 1:
        raise UserError(f"marks {list(marks)}, steps {steps}, batch {batch}: all must be at least 1")
    marks = sorted(set(marks))
    with processor_threads(threads) as used:
        results: dict[str, Any] = {
            "marks": marks,
            "steps": steps,
            "batch": batch,
            "device": device,
            "precision": str(dtype).removeprefix("torch."),
            "threads": used,
            "clock": clock,
            "captured": torch.device(device).type == "cuda",
            "rows": [],
            "not_timed": [model.name for model in models],
        }
        for model in models:
            row = _measure(model, marks, steps, batch, torch.device(device), dtype, clock, on_progress)
            results["rows"].append(row)
            results["not_timed"].remove(model.name)
            on_row(results)
    return results


def _measure(
    model: TimedModel,
    marks: Sequence[int],
    count: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    clock: ClockKind,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    dispatch.forget()
    resident = memory_now(device)
    built = model.build().to(device, dtype)
    longest = longest_input(built)
    count = max(count, model.chunk)  # whole chunks, so that every mark sees the same places of a chunk
    reached = [mark for mark in marks if mark + count + WARM <= longest]
    if not reached:
        raise UserError(f"{model.name}: it reads {longest} tokens, fewer than the first of --marks and its steps need")
    parameters = sum(parameter.numel() for parameter in built.parameters())
    room = min(longest, room_for(reached, count))
    points, worst = [], None
    with torch.inference_mode():
        steps = DecodeSteps(built, built.init_state(batch, max_length=room), [0] * batch)
        steps.prepare(room)
        last = _worst_place(model, reached[-1])
        for place in sorted({*reached, last} - {0}):
            on_progress(f"{model.name}: {place} tokens")
            if place == last:
                worst = _time_worst(steps, place, device, clock)
            if place in reached:
                points.append(_point(steps, model, place, count, device, batch, dtype, clock))
    first, end = points[0], points[-1]
    return {
        "name": model.name,
        "mixer": model.mixer,
        "weights": "random" if model.folder is None else str(model.folder),
        "layers": model.layers,
        "chunk": model.chunk if isinstance(model.config, PrefixScanConfig) else None,
        "parameters": parameters,
        "peak_bytes": memory_peak(device) - resident,
        "points": points,
        "ratio": end["milliseconds"]["median"] / first["milliseconds"]["median"],
        "worst": worst,
        "operators": dispatch.chosen(),
    }


def _worst_place(model: TimedModel, longest: int) -> int:
    """Return the boundary up to `longest` tokens that completes the largest tree; 0 where there is none."""
    if not isinstance(model.config, PrefixScanConfig) or longest < model.chunk:
        return 0
    return model.chunk << ((longest // model.chunk).bit_length() - 1)


def _read_until(steps: DecodeSteps, place: int, device: torch.device) -> Tensor:
    """Read random tokens up to `place`; return the most probable token behind them."""
    kinds = {mixer.kind for mixer in getattr(steps.model.config, "mixers", ())}
    # A piece of 2-simplicial attention costs pairs of all its keys.
    piece = 32 if "simplicial" in kinds else 1024
    generator = torch.Generator().manual_seed(place)
    vocabulary, batch = steps.model.context.vocab_size, len(steps.lengths)
    chosen_B = torch.zeros(batch, dtype=torch.int64, device=device)
    while (left := place - int(steps.lengths[0])) > 0:
        drawn_BT = torch.randint(vocabulary, (batch, min(piece, left)), generator=generator)
        chosen_B = steps.read(drawn_BT.to(device)).argmax(-1)
    return chosen_B


class Clock:
    """Marks in time: the host's clock on the CPU, events on a CUDA device, which then need not wait for the host.

    "processor" takes what this process's threads have computed instead of the time on the wall, on the CPU.
    """

    def __init__(self, device: torch.device, kind: ClockKind = "wall"):
        self.cuda = device.type == "cuda"
        self.now = time.process_time if kind == "processor" else time.perf_counter
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(self.now())

    def milliseconds(self) -> list[float]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * (end - start) for start, end in pairs]


def _point(
    steps: DecodeSteps,
    model: TimedModel,
    mark: int,
    count: int,
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    kind: ClockKind,
) -> dict[str, Any]:
    start = max(mark // model.chunk * model.chunk, int(steps.lengths[0]) + WARM)
    chosen_B = _read_until(steps, start - WARM, device)
    for _ in range(WARM):
        chosen_B = steps.step(chosen_B).argmax(-1)
    wait(device)
    clock, merges = Clock(device, kind), []
    clock.mark()
    for _ in range(count):
        chosen_B = steps.step(chosen_B).argmax(-1)
        clock.mark()
        merges.append(steps.model.settling(steps.lengths))
    taken = clock.milliseconds()
    inside = [ms for ms, work in zip(taken, merges, strict=True) if work is None]
    boundary = [ms for ms, work in zip(taken, merges, strict=True) if work is not None]
    return {
        "position": mark,
        "milliseconds": spread(inside or boundary),
        "boundary": spread(boundary) if boundary else None,
        "state_bytes": batch * model.config.state_bytes(model.context, mark, dtype),
    }


def _time_worst(steps: DecodeSteps, place: int, device: torch.device, kind: ClockKind) -> dict[str, Any]:
    """Time the step that reaches `place`, again and again from the same state."""
    if int(steps.lengths[0]) >= place:
        first_B1 = torch.zeros(len(steps.lengths), 1, dtype=torch.int64, device=device)
        steps.refill(first_B1, [1] * len(steps.lengths))
    chosen_B = _read_until(steps, place - 1, device)
    tensors = steps.state.tensors()
    kept = [tensor.clone() for tensor in tensors]
    taken = []
    for _ in range(WORST_REPEATS + 1):
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        steps.lengths[:] = place - 1
        wait(device)
        clock = Clock(device, kind)
        clock.mark()
        steps.step(chosen_B).argmax(-1)
        clock.mark()
        taken += clock.milliseconds()
    return {"position": place, "merges": steps.model.settling([place]), "milliseconds": spread(taken[1:])}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the 10th and 90th percentile, and how many there are."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
        "count": len(ordered),
    }
