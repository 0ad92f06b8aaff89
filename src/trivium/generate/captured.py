"""Decoding one token a row at a time from buffers of fixed shape: on a CUDA device each step replays a captured graph.

A graph saves the host's work for each kernel, which is most of the time of a small model's step. Models whose rows
have more to do at some places (a prefix scan's chunk boundaries) do that in a second graph, which is replayed when the
host's own count of tokens says that some row stands there; a mask keeps it from the others.

Shapes: B rows, V vocabulary.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trivium.mixers.base import State
from trivium.mixers.cache import fixed_shapes
from trivium.model.base import LanguageModel

Mode = Literal["auto", "eager", "fixed", "graph"]


class DecodeSteps:
    """Steps of one token a row for a model and a batch whose rows stay the same in number.

    `state` has seen `lengths` tokens in its rows and belongs to this object from now on. Mode "graph" captures each
    kind of step when it first comes and replays it from then on; "fixed" runs the same functions without a graph, on
    any device; "eager" is the model's ordinary streaming call. "auto" is "graph" on a CUDA device, "eager" elsewhere.
    Call it under no_grad or inference_mode, always the same. Raises ValueError for "graph" on another device.
    """

    def __init__(self, model: LanguageModel, state: State, lengths: Sequence[int] | np.ndarray, mode: Mode = "auto"):
        self.model, self.state = model, state
        self.lengths = np.array(lengths, dtype=np.int64)
        """Tokens that each row has seen; a finished row's count goes on, so that it only ever asks for too much."""
        device = state.tensors()[0].device
        self.mode = mode if mode != "auto" else ("graph" if device.type == "cuda" else "eager")
        if self.mode == "graph" and device.type != "cuda":
            raise ValueError(f"mode: graph needs a CUDA device, the state is on {device}; give fixed or eager")
        rows = len(self.lengths)
        self._tokens_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._added_B = torch.ones(rows, dtype=torch.int64, device=device)
        self._logits_BV: Tensor | None = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    @property
    def fixed(self) -> bool:
        """Whether the rows must stay as many as they are."""
        return self.mode != "eager"

    def refill(self, tokens_BT: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Empty every row and read new prompts, `lengths` tokens of each row (0: none); return the logits (B, V) behind
        each one's last. The graphs stay: the state's tensors are the same.
        """
        self.lengths = np.array(lengths, dtype=np.int64)
        device = self._tokens_B1.device
        rows_B = torch.arange(len(self.lengths), device=device)
        lengths_B = torch.from_numpy(self.lengths).to(device)
        self.state = self.state.reset(rows_B)
        ragged = bool((self.lengths != tokens_BT.shape[1]).any())
        logits_BTV, self.state = self.model(tokens_BT, self.state, lengths_B=lengths_B if ragged else None)
        return logits_BTV[rows_B, (lengths_B - 1).clamp(min=0)]

    def read(self, tokens_BT: Tensor) -> Tensor:
        """Read some more tokens of each row at once and return the logits (B, V) behind the last."""
        logits_BTV, self.state = self.model(tokens_BT, self.state)
        self.lengths += tokens_BT.shape[1]
        return logits_BTV[:, -1]

    def prepare(self, room: int) -> None:
        """Capture what steps of rows that grow to `room` tokens will replay, so that none of them waits for it."""
        if self.mode != "graph":
            return
        self._graph("step", self._step)
        for work in range(_count(self.model.settling(range(room + 1)))):
            self._graph(work, lambda work=work: self.model.settle(self.state, self._added_B, work))

    def step(self, tokens_B: Tensor, active_B: Tensor | None = None) -> Tensor:
        """Read one token a row and return the logits (B, V) behind it; in a graph, memory that the next step writes.

        Rows that `active_B` (bool) leaves out are finished: they stay as they are until `refill`. The others must not
        outgrow the state's room.
        """
        if self.mode == "eager":
            added_B = None if active_B is None else active_B.long()
            logits_B1V, self.state = self.model(tokens_B[:, None], self.state, lengths_B=added_B)
            self.lengths += 1
            return logits_B1V[:, 0]
        self._tokens_B1.copy_(tokens_B[:, None])
        if active_B is None:
            self._added_B.fill_(1)
        else:
            self._added_B.copy_(active_B)
        self._run("step", self._step)
        self.lengths += 1
        work = self.model.settling(self.lengths)
        if work is not None:
            self._run(work, lambda: self.model.settle(self.state, self._added_B, work))
        assert self._logits_BV is not None
        return self._logits_BV

    def select(self, kept_A: Tensor) -> None:
        """Keep only these rows. Raises ValueError where the number of rows is fixed."""
        if self.fixed:
            raise ValueError(f"mode {self.mode}: the rows of captured steps stay as many as they are")
        self.state = self.state.select(kept_A)
        self.lengths = self.lengths[kept_A.cpu().numpy()]
        self._tokens_B1 = self._tokens_B1[kept_A]

    def _step(self) -> None:
        logits_B1V, self.state = self.model.step(self._tokens_B1, self.state, self._added_B)
        self._logits_BV = logits_B1V[:, 0]

    def _run(self, key: Hashable, function: Callable[[], None]) -> None:
        if self.mode == "fixed":
            with fixed_shapes():
                function()
            return
        self._graph(key, function).replay()

    def _graph(self, key: Hashable, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if key not in self._graphs:
            self._graphs[key] = self._capture(function)
        return self._graphs[key]

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Return the graph of `function`, which first runs as it will in the graph, with every row left out: libraries
        load and kernels compile, and the state stays as it is.
        """
        kept_B = self._added_B.clone()
        self._added_B.zero_()
        with fixed_shapes():
            for _ in range(2):
                function()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = capture(function, self._pool)
        self._added_B.copy_(kept_B)
        return graph


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise RuntimeError where an operation waits for the device, which no graph can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not find every such operation
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Return the graph of `function`, which has run before and does not run now."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool), fixed_shapes():
        function()
    return graph


def _count(most: int | None) -> int:
    return 0 if most is None else most + 1
