"""Time functions on a device: medians of single runs, with what a cache would keep thrown out between them.

On a GPU runs are queued one behind the other and waited for at the end, as a model's layers are: what the host does to
launch one shows where it takes longer than the device with the one before.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH = 2**28  # bytes, several times a GPU's last cache


class Clock:
    """Medians for one device. `seconds` is spent on each, in at least `least` and at most `most` runs."""

    def __init__(self, device: str, *, seconds: float = 0.4, least: int = 5, most: int = 200):
        self.on_gpu = device.startswith("cuda")
        self.seconds, self.least, self.most = seconds, least, most
        self._flush = torch.empty(FLUSH if self.on_gpu else 0, dtype=torch.int8, device=device)

    def median(self, function: Callable[[], Any]) -> float:
        """Return the median seconds of a call, after calls that warm it up."""
        self._once(function)
        warm = self._once(function)
        runs = max(self.least, min(self.most, int(self.seconds / max(warm, 1e-6))))
        if self.on_gpu:
            return statistics.median(self._queued(function, runs))
        return statistics.median(self._once(function) for _ in range(runs))

    def graph_median(self, function: Callable[[], Any], *, before: Callable[[], Any] | None = None) -> float | None:
        """Return the median seconds of a replay of a CUDA graph of one call, which leaves launching out; or None.

        `before` is called once on the graph's stream: autograd's backward runs where its forward ran.
        """
        if not self.on_gpu:
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if before is not None:
                before()
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        return self.median(graph.replay)

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """Return how many bytes a call needs at its peak beside what is in use; None but on a GPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _once(self, function: Callable[[], Any]) -> float:
        if not self.on_gpu:
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin
        return self._queued(function, 1)[0]

    def _queued(self, function: Callable[[], Any], runs: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]
