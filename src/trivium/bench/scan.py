"""Time the training of the prefix-scan model by a level-batched scan beside the sequential counter.

Both compute the same prefixes in the same bracketing; before any timing, loss and gradients must agree. They take
turns, so that whatever else the machine does meets both. Run with ``python -m trivium.bench.scan --help``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trivium.bench.gates import WrongResult
from trivium.bench.threads import processor_threads
from trivium.config import UserError
from trivium.model.base import ModelContext
from trivium.model.prefix_scan import PrefixScan, PrefixScanConfig
from trivium.ops import OnlineScan
from trivium.ops.scan import prefixes
from trivium.train.config import TrainConfig
from trivium.train.environment import describe_environment
from trivium.train.optim import build_optimizer, clip_and_update

TOLERANCE = 1e-4  # relative to the largest entry, in float32
VOCABULARY = 64


@dataclass(frozen=True)
class ScanShape:
    """Sizes of one measurement."""

    width: int
    chunks: int = 64
    chunk: int = 8
    batch: int = 4
    heads: int = 4

    def __post_init__(self):
        if self.chunks < 3:
            raise UserError(f"chunks: expected 3 or more, got {self.chunks}: of fewer no two are combined")

    @property
    def name(self) -> str:
        return f"{self.chunks} chunks of {self.chunk}, width {self.width}, batch {self.batch}"


SHAPES = (ScanShape(64), ScanShape(128), ScanShape(256))


def counter_prefixes(chunks: Tensor, combine: Callable[[Tensor, Tensor], Tensor], identity: Tensor) -> Tensor:
    """Return what `trivium.ops.scan.prefixes` returns, one chunk after another."""
    online = OnlineScan(combine, identity.expand(chunks.shape[1:]))
    found = [online.prefix()]
    for chunk in chunks:
        online.push(chunk)
        found.append(online.prefix())
    return torch.stack(found)


SCANS: dict[str, Callable[..., Tensor]] = {"levels": prefixes, "counter": counter_prefixes}


WHATS = ("step", "one by one", "scan")
CAPTURED = tuple(f"{what}, captured" for what in WHATS)
"""On a CUDA device each is timed once more as a graph that is replayed, as `trivium train` takes its steps."""


def bench_scan(
    shapes: tuple[ScanShape, ...] = SHAPES, *, repeats: int = 20, device: str = "cpu", threads: int | None = None
) -> dict[str, Any]:
    """Return the milliseconds (median, least) of a training step and of the scan alone, by levels and by counter.

    A step is forward, backward, clipping and the AdamW of `trivium train`, of a model with one layer in the aggregator
    and one in the predictor; the scan alone is its forward and backward. "one by one" also lets the predictor of the
    counter's model read one chunk after another. On a CUDA device each is timed as a captured graph too. Raises
    WrongResult if the ways do not agree.
    """
    with processor_threads(threads) as count:
        rows = [_measure(shape, repeats, torch.device(device)) for shape in shapes]
    environment = describe_environment(torch.device(device))
    return {"benchmark": "scan", "unit": "ms", "threads": count, "environment": environment, "rows": rows}


def _measure(shape: ScanShape, repeats: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    tokens = shape.chunks * shape.chunk
    config = PrefixScanConfig(chunk=shape.chunk, width=shape.width, heads=shape.heads)
    model = config.build(ModelContext(VOCABULARY, tokens)).to(device)
    tokens_BT = torch.randint(VOCABULARY, (shape.batch, tokens), device=device)
    _check(model, tokens_BT)
    on_gpu = device.type == "cuda"
    optimizer, parameters = build_optimizer(model, TrainConfig(learning_rate=1e-4)), list(model.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    leaves = torch.randn(shape.chunks - 1, shape.batch, shape.chunk, shape.width, device=device, requires_grad=True)

    def train(logits: Callable[[PrefixScan, Tensor], Tensor]) -> None:
        optimizer.zero_grad()
        _loss(model, tokens_BT, logits).backward()
        clip_and_update(optimizer, scaler, parameters, 1.0)

    def step() -> None:
        train(_at_once)

    def one_by_one() -> None:
        train(_one_by_one if model.scan is SCANS["counter"] else _at_once)

    def scan() -> None:
        model.zero_grad()
        model.scan(leaves, model.aggregator, leaves.new_zeros(())).square().sum().backward()

    row: dict[str, Any] = {"shape": asdict(shape), "name": shape.name}
    works: dict[str, dict[str, Callable[[], None]]] = {}
    for what, work in zip(WHATS, (step, one_by_one, scan), strict=True):
        works[what] = {name: _by(model, way, work) for name, way in SCANS.items()}
    for what in WHATS:
        row[what] = _in_turns(works[what], repeats, device)
    if on_gpu:
        for what, captured in zip(WHATS, CAPTURED, strict=True):
            row[captured] = _in_turns({name: _graph(work) for name, work in works[what].items()}, repeats, device)
    return row


def _by(model: PrefixScan, way: Callable[..., Tensor], work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        model.scan = way
        work()

    return run


def _in_turns(ways: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 2):
        for name, work in ways.items():
            taken = _time(work, device)
            if repeat >= 2:
                seconds[name].append(taken)
    found: dict[str, Any] = {
        name: {"median": 1e3 * statistics.median(taken), "least": 1e3 * min(taken)} for name, taken in seconds.items()
    }
    return found | {"times_faster": found["counter"]["median"] / found["levels"]["median"]}


def _graph(work: Callable[[], None]) -> Callable[[], None]:
    """Return what replays the CUDA graph of `work`; it runs first beside it, so that nothing is made within."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _at_once(model: PrefixScan, tokens_BT: Tensor) -> Tensor:
    return model(tokens_BT)[0]


def _one_by_one(model: PrefixScan, tokens_BT: Tensor) -> Tensor:
    """Return the logits of the model as it is defined: each chunk behind the counter's prefix."""
    online: OnlineScan[Tensor | None] = OnlineScan(model.aggregator, None)
    chunks = model.encoder(tokens_BT).split(model.config.chunk, dim=1)
    found = [model.predictor(None, chunks[0])]
    for before_BcD, x_BcD in pairwise(chunks):
        online.push(before_BcD)
        found.append(model.predictor(online.prefix(), x_BcD))
    return functional.linear(torch.cat(found, dim=1), model.encoder.embedding.weight)


def _loss(model: PrefixScan, tokens_BT: Tensor, logits: Callable[[PrefixScan, Tensor], Tensor] = _at_once) -> Tensor:
    logits_BTV = logits(model, tokens_BT)
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def _check(model: PrefixScan, tokens_BT: Tensor) -> None:
    found: list[list[Tensor]] = []
    for way, logits in (("levels", _at_once), ("counter", _at_once), ("counter", _one_by_one)):
        model.scan = SCANS[way]
        loss = _loss(model, tokens_BT, logits)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for mine, *others in zip(*found, strict=True):
        for theirs in others:
            difference = float((mine - theirs).detach().abs().max())
            if not difference <= TOLERANCE * float(theirs.detach().abs().max()):
                raise WrongResult(f"the level-batched scan and the counter differ by {difference:g}; nothing was timed")


def _time(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line for each shape, and write the results where asked."""
    parser = argparse.ArgumentParser(prog="python -m trivium.bench.scan", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats of each (default: 20)")
    parser.add_argument("--out", type=Path, help="file to write the results to, such as benchmarks/results/scan.json")
    options = parser.parse_args(arguments)
    results = bench_scan(repeats=options.repeats, device=options.device, threads=options.threads)
    for row in results["rows"]:
        for what in (what for what in (*WHATS, *CAPTURED) if what in row):
            levels, counter = (row[what][name]["median"] for name in SCANS)
            faster = row[what]["times_faster"]
            print(f"{row['name']}: {what} {levels:.2f} ms by levels, {counter:.2f} ms by counter, {faster:.1f} times")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
