"""The training step as a CUDA graph: one launch a step, with no Python between its kernels.

A graph is made for each shape of batch and replayed on whatever its buffer holds. The first step of a shape runs
eagerly, which lets kernels be tuned and compiled; the second does too, and finds out whether anything in it waits for
the device, which a graph cannot; from the third on there is a graph. Once one shape has a graph, others have theirs
from their second step on. Every one of them is a step of the run.
"""

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trivium
from trivium.config import UserError
from trivium.generate.captured import no_waiting
from trivium.train.distributed import World
from trivium.train.precision import Precision
from trivium.train.step import Read, Step

MOST_GRAPHS = 64  # of one run; shapes beyond them run eagerly
SLOTS = 8  # steps that the host may be ahead of the device

_log = logging.getLogger("trivium")
_ALIGNMENT = 16

Layout = tuple[tuple[tuple[int, ...], np.dtype], ...]
Losses = tuple[Tensor, Tensor]


@dataclass
class Choice:
    """Whether steps are captured, and why."""

    captured: bool
    reason: str

    def record(self) -> dict[str, Any]:
        """Return it as environment.json keeps it."""
        return {"captured": self.captured, "reason": self.reason}


def choose_capture(requested: str, device: torch.device, world: World, precision: Precision) -> Choice:
    """Return whether the steps of a run are captured; raise UserError where `requested` is yes and they cannot be."""
    if requested not in ("auto", "yes", "no"):
        raise UserError(f"train.capture: {requested!r} is not allowed; allowed: auto, yes, no")
    if requested == "no":
        return Choice(False, "asked for")
    why = None
    if device.type != "cuda":
        why = f"graphs are of CUDA devices, this run is on {device.type}"
    elif world.size > 1:
        why = f"{world.size} processes exchange their gradients"
    elif precision.name == "float16":
        why = "float16 skips steps that overflow"
    if why is None:
        return Choice(True, "asked for" if requested == "yes" else "auto: one process on a CUDA device")
    if requested == "yes":
        raise UserError(f"train.capture: yes is not possible: {why}; allowed: auto, no")
    return Choice(False, f"auto: {why}")


class EagerSteps:
    """Takes each step as Python goes through it."""

    def __init__(self, step: Step, device: torch.device):
        self.step, self.device = step, device

    def __call__(self, passes: Sequence[Read], weight: float) -> Losses:
        """Return (loss, gradient norm), on the device."""
        on_device = [read.each(lambda x: torch.from_numpy(x).to(self.device, non_blocking=True)) for read in passes]
        return self.step(on_device, weight)

    def renew(self, step: Step) -> None:
        """Take `step` from here on: what trains, or what the model computes, has changed."""
        self.step = step

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold what steps need; here nothing."""
        yield


@dataclass
class _Shape:
    """What is known of one shape of batch."""

    each: int  # arrays of a pass
    steps: int = 0
    buffer: Tensor | None = None
    replay: Callable[[], Losses] | None = None


class CapturedSteps:
    """Takes steps by replaying a graph for each shape of batch; `choice` tells what became of it.

    Batches reach the device through pinned memory, so that the host makes the next ones while the device computes.
    `record` turns a function into one that repeats what it did; on a CUDA device that is a graph.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        choice: Choice,
        required: bool = False,
        *,
        record: Callable[[Callable[[], Losses]], Callable[[], Losses]] | None = None,
    ):
        self.step, self.device, self.choice, self.required = step, device, choice, required
        self._record = record or self._graph
        self._shapes: dict[tuple[Layout, int], _Shape] = {}
        self._slots = [_Slot(device) for _ in range(SLOTS)]
        self._taken = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Do everything on the stream of the graphs, which then see what others did there, and others what they did."""
        if self._stream is None:
            yield
            return
        before = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.synchronize(self.device)
            self._shapes.clear()  # a graph that outlived its run would keep the memory of a whole step

    def __call__(self, passes: Sequence[Read], weight: float) -> Losses:
        """Return (loss, gradient norm), on the device."""
        arrays = [x for read in passes for x in read if x is not None] + [np.array(weight, dtype=np.float32)]
        layout = tuple((array.shape, array.dtype) for array in arrays)
        each = (len(arrays) - 1) // len(passes)  # packed documents are one more; the passes of a step are alike in that
        shape = self._shapes.setdefault((layout, each), _Shape(each))
        shape.steps += 1
        graphs = self._num_graphs()
        due = 2 if graphs else 3  # a step that can be captured at one shape can at another, and if not that is noticed
        if shape.replay is None and shape.steps >= due and self.choice.captured and graphs < MOST_GRAPHS:
            self._capture(layout, shape)
        buffer = shape.buffer if shape.replay else None
        buffer = self._send(arrays, layout, buffer)
        if shape.replay:
            # The next replay writes where this one did.
            loss, norm = shape.replay()
            return loss.clone(), norm.clone()
        if shape.steps == 2 and self.choice.captured and self.device.type == "cuda":
            return self._watched(layout, buffer, each)
        return self._run(layout, buffer, each)

    def renew(self, step: Step) -> None:
        """Take `step` from here on: what trains, or what the model computes, has changed. Graphs are made anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step = step
        self._shapes.clear()

    def _run(self, layout: Layout, buffer: Tensor, each: int) -> Losses:
        *tensors, weight = (x for x in _views(buffer, layout))
        return self.step([Read(*tensors[i : i + each]) for i in range(0, len(tensors), each)], weight)

    def _watched(self, layout: Layout, buffer: Tensor, each: int) -> Losses:
        """Run a step that may not wait for the device; if it does, say where, and take it again."""
        random = torch.cuda.get_rng_state(self.device)
        try:
            with no_waiting():
                return self._run(layout, buffer, each)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._give_up(error)
        # The update itself waits for nothing: what failed came before it, and the weights are as they were.
        self.step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.set_rng_state(random, self.device)
        return self._run(layout, buffer, each)

    def _capture(self, layout: Layout, shape: _Shape) -> None:
        shape.buffer = torch.empty(_size(layout), dtype=torch.uint8, device=self.device)
        buffer = shape.buffer
        try:
            shape.replay = self._record(lambda: self._run(layout, buffer, shape.each))
        except RuntimeError as error:
            self._give_up(error)  # nothing was computed
            self.step.optimizer.zero_grad(set_to_none=True)

    def _graph(self, run: Callable[[], Losses]) -> Callable[[], Losses]:
        graph, random = torch.cuda.CUDAGraph(), torch.cuda.get_rng_state(self.device)
        try:
            # A thread of a tracker may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                made = run()
        except RuntimeError:
            # The generator still counts for the graph that failed: it goes on with a state of its own.
            index = self.device.index or 0
            fresh = torch.Generator(self.device).set_state(random)
            torch.cuda.default_generators[index].graphsafe_set_state(fresh)
            raise

        def replay() -> Losses:
            graph.replay()
            return made

        return replay

    def _give_up(self, error: RuntimeError) -> None:
        """Run eagerly from here on, and say why."""
        where = _innermost(error)
        reason = f"{where}: {str(error).splitlines()[0]}"
        if self.required:
            raise UserError(f"train.capture: yes is not possible: {reason}; allowed: auto, no") from error
        self.choice.captured, self.choice.reason = False, f"the step cannot be captured: {reason}"
        _log.warning("training steps run eagerly: %s", self.choice.reason)

    def _num_graphs(self) -> int:
        return sum(shape.replay is not None for shape in self._shapes.values())

    def _send(self, arrays: list[np.ndarray], layout: Layout, buffer: Tensor | None) -> Tensor:
        slot = self._slots[self._taken % SLOTS]
        self._taken += 1
        if buffer is None:
            buffer = torch.empty(_size(layout), dtype=torch.uint8, device=self.device)
        slot.send(arrays, layout, buffer)
        return buffer


class _Slot:
    """Pinned memory that one batch passes through."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.places: dict[Layout, list[np.ndarray]] = {}
        self.sent = torch.cuda.Event() if self.cuda else None

    def send(self, arrays: list[np.ndarray], layout: Layout, buffer: Tensor) -> None:
        """Copy `arrays` into `buffer`, without waiting for it; wait for the copy before, which is long done."""
        if self.sent is not None:
            self.sent.synchronize()
        if self.memory.numel() < buffer.numel():
            self.memory = torch.empty(buffer.numel(), dtype=torch.uint8, pin_memory=self.cuda)
            self.places.clear()
        if layout not in self.places:
            self.places[layout] = [view.numpy() for view in _views(self.memory, layout)]
        for place, array in zip(self.places[layout], arrays, strict=True):
            place[...] = array
        buffer.copy_(self.memory[: buffer.numel()], non_blocking=True)
        if self.sent is not None:
            self.sent.record()


def _offsets(layout: Layout) -> list[int]:
    """Return where each array begins in a buffer, and behind the last one its size."""
    offsets = [0]
    for shape, dtype in layout:
        size = int(np.prod(shape)) * dtype.itemsize
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets


def _size(layout: Layout) -> int:
    return _offsets(layout)[-1]


def _views(buffer: Tensor, layout: Layout) -> Iterator[Tensor]:
    """Yield the tensors that share the memory of a buffer of bytes."""
    for (shape, dtype), start in zip(layout, _offsets(layout), strict=False):
        stop = start + int(np.prod(shape)) * dtype.itemsize
        yield buffer[start:stop].view(_TORCH[dtype.name]).view(shape)


_TORCH = {"int64": torch.int64, "float32": torch.float32}


def _innermost(error: BaseException) -> str:
    """Return file and line of our code, or of the last code at all, in which `error` came up."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(trivium.__file__).parent
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    ours = [frame for frame in ours if Path(frame.filename).parent.name != "train"] or ours or frames
    frame = ours[-1]
    path = Path(frame.filename)
    return f"{path.relative_to(package.parent) if path.is_relative_to(package) else path.name}:{frame.lineno}"
