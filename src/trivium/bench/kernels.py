"""Time the kernels of 2-simplicial attention: forward, backward and one token of decoding, each found right first.

Every rate stands beside the matrix product and the copy of the same run. FLOPs are 4 D for each allowed (query head, j,
k) forward and 2.5 times that backward. Before a call is timed its gradients are compared at fewer tokens, and at full
size its output for some queries, with plain PyTorch in float32; a wrong backend raises, a wrong peer is not timed.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from trivium.bench.clock import FLUSH, Clock
from trivium.bench.gates import WrongResult
from trivium.bench.ops import SimplicialShape
from trivium.ops import dispatch, simplicial_attention, simplicial_decode
from trivium.ops.pairs import allowed_pairs
from trivium.registry import UserError

__all__ = ["DECODED", "PASSES", "SWEEP", "TARGETS", "bench_kernels", "kernels_at_hand", "load_peer", "peers_at_hand"]

PASSES = ("forward", "backward", "decode")
# The shapes that public kernels were measured at (benchmarks/results/simplicial_gpu.json).
TARGETS = (
    SimplicialShape(4, 4096, 64, 1, 128, 512, 32),
    SimplicialShape(4, 8192, 128, 1, 128, 512, 32),
    SimplicialShape(4, 8192, 128, 1, 128, 1024, 32),
    SimplicialShape(1, 2048, 64, 1, 128, 512, 32),
    SimplicialShape(8, 1024, 8, 8, 64, 512, 32),
    SimplicialShape(16, 1024, 12, 12, 64, 128, 16),
    SimplicialShape(64, 128, 8, 8, 32, 128, 16),
)
# Rows that have seen `tokens` get one more.
DECODED = (SimplicialShape(64, 1024, 64, 1, 128, 512, 32),)
# How rates grow with the tokens and the query heads of a key/value head.
SWEEP = tuple(
    SimplicialShape(1, tokens, heads, 1, 128, 512, 32)
    for heads in (8, 32, 128)
    for tokens in (512, 1024, 2048, 4096, 8192)
)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
CHECKED_TOKENS, CHECKED_ROWS, CHECKED_QUERIES = 700, 2, 48
MOST_LAYERS = 16  # of one graph of decoding
PEER = "simplicial-attention"
PEER_WIDTH = 64  # wider heads are wrong there

Attention = Callable[..., Tensor]


def load_peer(text: str) -> tuple[str, Attention]:
    """Return (name, function) of NAME=module:function; the function has the signature of `simplicial_attention`."""
    name, _, path = text.partition("=")
    module, _, function = path.partition(":")
    if not (name and module and function):
        raise UserError(f"--peer: {text!r} is not NAME=module:function")
    try:
        return name, getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--peer: {text!r}: {error}") from error


def peers_at_hand() -> dict[str, Attention]:
    """Return the peers that this machine has: the pip package simplicial-attention."""
    if find_spec("simplicial_attention") is None or not torch.cuda.is_available():
        return {}

    def attend(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, *, window1: int, window2: int) -> Tensor:
        if q.shape[-1] > PEER_WIDTH:
            raise ValueError(f"head width {q.shape[-1]}; right up to {PEER_WIDTH}")
        module = importlib.import_module("simplicial_attention.triton_two_simplicial_attention")
        return module.sliding_two_simplicial_attn(q, (k1, k2), (v1, v2), w1=window1, w2=window2, causal=True)

    return {PEER: attend}


def bench_kernels(
    shapes: Sequence[SimplicialShape] = TARGETS,
    backends: Sequence[str] | None = None,
    *,
    decoded: Sequence[SimplicialShape] = DECODED,
    passes: Sequence[str] = PASSES,
    form: str = "trilinear",
    peers: Mapping[str, Attention] | None = None,
    sweep: Sequence[SimplicialShape] = (),
    device: str = "cuda",
    matrix: int | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
    on_row: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Return {"operator", "device", "form", "dtype", "matmul_tflops", "copy_bytes_per_second", "rows", "not_timed"}.

    A row is one shape, pass and backend or peer: "seconds" (median), "tflops", "share" of the product of matrices of
    `matrix`^2 (8192 on a GPU) in the same run, "peak_bytes" above the inputs, "relative_error"; or "not_run" and why. A
    row of `sweep`, shapes at which the fastest backend alone is timed, has "sweep": True. A decode row, whose shapes
    are `decoded`, has "times_floor" and "floor_seconds", the larger of its bytes over the copy's rate and its FLOPs
    over the product's; its "seconds" are those of one of "layers" calls in a CUDA graph, and "alone_seconds" those of a
    graph of one call, before which nothing is in a cache. "graph_seconds" and "graph_tflops" are those of a replay of
    the same call as a CUDA graph, of our own backends alone, where "seconds" holds the host too. Backends default to
    the kernels of this machine, of which the fastest comes first. `on_row` is told the results so far after each row,
    those to come named in "not_timed". Raises UserError for a backend that is missing and WrongResult for a wrong one.
    """
    if form == "factorized":
        raise UserError("form: factorized has no kernel; allowed: trilinear, determinant")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    clock = Clock(device)
    matrix = matrix or (8192 if device.startswith("cuda") else 1024)
    chosen = kernels_at_hand(device) if backends is None else list(backends)
    for name in chosen:
        dispatch.choose("simplicial", name, device.partition(":")[0])
    results: dict[str, Any] = {"operator": "simplicial", "device": device, "form": form, "dtype": str(dtype)[6:]}
    results |= {"matrix": matrix} | _ceilings(clock, device, dtype, matrix)
    rows: list[dict[str, Any]] = []
    results["rows"] = rows
    whole = [kind for kind in passes if kind != "decode"]
    # What ends a run early leaves the fastest backend's rows.
    fastest_first = chosen[::-1]
    jobs = [(name, None, False, kind, x) for name in fastest_first for kind in whole for x in shapes]
    jobs += [(name, None, False, "decode", x) for name in fastest_first for x in decoded if "decode" in passes]
    jobs += [(chosen[-1], None, True, kind, x) for kind in whole for x in sweep]
    # Peers come last: one that breaks the device's context takes no result of ours with it.
    jobs += [(name, peer, False, kind, x) for name, peer in (peers or {}).items() for kind in whole for x in shapes]
    results["not_timed"] = [f"{shape.name}: {kind}, {name}" for name, _, _, kind, shape in jobs]
    for name, peer, swept, kind, shape in jobs:
        on_progress(results["not_timed"][0])
        row = {"shape": shape.name, **asdict(shape), "pass": kind, "backend": name, "peer": peer is not None}
        row |= {"sweep": True} if swept else {}
        job = _Job(shape, name, peer, form, device, dtype)
        rows.append(row | _with_shares(_measure(job, kind, clock), job, kind, results))
        del results["not_timed"][0]
        on_row(results)
    return results


def kernels_at_hand(device: str) -> list[str]:
    """Return the backends with kernels for `device`, the fastest last; plain PyTorch where there is none."""
    if not device.startswith("cuda"):
        return ["torch"]
    found = [name for name, missing in dispatch.backends("simplicial").items() if missing is None]
    return [name for name in found if name in ("triton", "hopper")] or ["torch"]


def _ceilings(clock: Clock, device: str, dtype: torch.dtype, matrix: int) -> dict[str, float]:
    a, b = (torch.randn(matrix, matrix, device=device, dtype=dtype) for _ in range(2))
    product = clock.median(lambda: a @ b)
    source = torch.randn(matrix * 4, matrix, device=device)
    target = torch.empty_like(source)
    copied = clock.median(lambda: target.copy_(source))
    return {
        "matmul_tflops": 2 * matrix**3 / product / 1e12,
        "copy_bytes_per_second": 2 * source.nbytes / copied,
    }


class _Job:
    """One shape with one backend or peer."""

    def __init__(
        self, shape: SimplicialShape, name: str, peer: Attention | None, form: str, device: str, dtype: torch.dtype
    ):
        self.shape, self.name, self.peer, self.form = shape, name, peer, form
        self.device, self.dtype = device, dtype

    def draw(self, shape: SimplicialShape, tokens: Sequence[int] | None = None) -> list[Tensor]:
        """Return random q, k1, k2, v1, v2; `tokens` counts those of each, or the shape's."""
        heads = [shape.heads, *[shape.kv_heads] * 4]
        generator = torch.Generator(self.device).manual_seed(0)
        return [
            torch.randn(
                shape.batch, count, n, shape.head_width, generator=generator, device=self.device, dtype=self.dtype
            )
            for n, count in zip(heads, tokens or [shape.tokens] * 5, strict=True)
        ]

    def attend(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        windows = {"window1": self.shape.window1, "window2": self.shape.window2}
        if self.peer is not None and backend is None:
            return self.peer(*inputs, **windows)
        return simplicial_attention(*inputs, **windows, form=self.form, backend=backend or self.name)  # pyright: ignore

    def decode(self, inputs: Sequence[Tensor], lengths: Tensor, backend: str | None = None) -> Tensor:
        windows = {"window1": self.shape.window1, "window2": self.shape.window2}
        return simplicial_decode(*inputs, lengths, **windows, form=self.form, backend=backend or self.name)  # pyright: ignore

    def flops(self, kind: str) -> float:
        shape = self.shape
        if kind == "decode":
            pairs = min(shape.window1, shape.tokens) * min(shape.window2, shape.tokens)
        else:
            pairs = allowed_pairs(shape.tokens, shape.window1, shape.window2)
        return 4 * shape.head_width * shape.batch * shape.heads * pairs * (2.5 if kind == "backward" else 1)

    def decode_bytes(self) -> int:
        """Return the bytes of both rings, of q and of o, each read or written once."""
        shape = self.shape
        rings = 2 * shape.kv_heads * (min(shape.window1, shape.tokens) + min(shape.window2, shape.tokens))
        return shape.batch * shape.head_width * self.dtype.itemsize * (rings + 2 * shape.heads)


def _measure(job: _Job, kind: str, clock: Clock) -> dict[str, Any]:
    try:
        return {"forward": _forward, "backward": _backward, "decode": _decode}[kind](job, clock)
    except torch.OutOfMemoryError:
        return {"not_run": "out of memory"}
    except Exception as error:
        # Our own backends refuse by name what they cannot; of a peer anything may be expected.
        if job.peer is None and not isinstance(error, UserError):
            raise
        return {"not_run": (str(error).strip() or type(error).__name__).splitlines()[0]}


def _with_shares(found: dict[str, Any], job: _Job, kind: str, results: Mapping[str, Any]) -> dict[str, Any]:
    if "seconds" not in found:
        return found
    found["tflops"] = job.flops(kind) / found["seconds"] / 1e12
    found["share"] = found["tflops"] / results["matmul_tflops"]
    if "graph_seconds" in found:
        found["graph_tflops"] = job.flops(kind) / found["graph_seconds"] / 1e12
    if kind == "decode":
        copied = job.decode_bytes() / results["copy_bytes_per_second"]
        found["floor_seconds"] = max(copied, job.flops(kind) / results["matmul_tflops"] / 1e12)
        found["times_floor"] = found["seconds"] / found["floor_seconds"]
    return found


def _forward(job: _Job, clock: Clock) -> dict[str, Any]:
    inputs = job.draw(job.shape)
    with torch.no_grad():
        error = _refuse(job, "o", _queries_off(job, inputs, job.attend(inputs)))
        peak = clock.peak_bytes(lambda: job.attend(inputs))
        seconds = clock.median(lambda: job.attend(inputs))
        found = {"relative_error": error, "seconds": seconds, "peak_bytes": peak}
        if job.peer is None and (graph := clock.graph_median(lambda: job.attend(inputs))) is not None:
            found["graph_seconds"] = graph
    return found


def _backward(job: _Job, clock: Clock) -> dict[str, Any]:
    error = max(_refuse(job, name, off) for name, off in _gradients_off(job).items())
    drawn = job.draw(job.shape)
    gradient = torch.randn_like(drawn[0])
    inputs, o = drawn, gradient

    def forward() -> None:
        # Leaves of its own: their part of autograd belongs to the stream that first used them.
        nonlocal inputs, o
        inputs = [x.detach().requires_grad_() for x in drawn]
        o = job.attend(inputs)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, inputs, gradient, retain_graph=True)

    forward()
    peak = clock.peak_bytes(backward)
    found = {"relative_error": error, "seconds": clock.median(backward), "peak_bytes": peak}
    if job.peer is None and (graph := clock.graph_median(backward, before=forward)) is not None:
        found["graph_seconds"] = graph
    return found


def _decode(job: _Job, clock: Clock) -> dict[str, Any]:
    shape = job.shape
    slots = [min(shape.window1, shape.tokens), min(shape.window2, shape.tokens)]
    inputs = job.draw(shape, [1, *slots, *slots])
    lengths = torch.full((shape.batch,), shape.tokens, device=job.device)
    with torch.no_grad():
        wanted = job.decode([x.float() for x in inputs], lengths, "torch")
        error = _refuse(job, "o", _off(job.decode(inputs, lengths), wanted))
        peak = clock.peak_bytes(lambda: job.decode(inputs, lengths))
        eager = clock.median(lambda: job.decode(inputs, lengths))
        found = {"relative_error": error, "seconds": eager, "peak_bytes": peak}
        alone = clock.graph_median(lambda: job.decode(inputs, lengths))
        if alone is None:
            return found
        # A token's step is a graph of layers, each with rings of its own, which no cache holds together.
        layers = [inputs]
        for _ in range(min(max(FLUSH // job.decode_bytes(), 2), MOST_LAYERS) - 1):
            layers.append([x.clone() for x in inputs])
        whole = clock.graph_median(lambda: [job.decode(x, lengths) for x in layers])
    assert whole is not None
    found |= {"eager_seconds": eager, "alone_seconds": alone, "layers": len(layers)}
    return found | {"seconds": whole / len(layers)}


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def _refuse(job: _Job, what: str, error: float) -> float:
    if not error <= TOLERANCE[job.dtype]:
        raise WrongResult(f"{job.name} at {job.shape.name}: {what} is off by {error:.1e} of its size; not timed")
    return error


def _gradients_off(job: _Job) -> dict[str, float]:
    """Return the relative error of o and of each gradient, at fewer tokens and rows."""
    shape = job.shape
    less = replace(shape, batch=min(shape.batch, CHECKED_ROWS), tokens=min(shape.tokens, CHECKED_TOKENS))
    inputs = [x.requires_grad_() for x in job.draw(less)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    found, wanted = job.attend(inputs), job.attend(wide, "torch")
    gradient = torch.randn_like(found)
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(wanted, wide, gradient.float()), strict=True
    )
    names = ("o", "dq", "dk1", "dk2", "dv1", "dv2")
    return {name: _off(x.detach(), y.detach()) for name, (x, y) in zip(names, pairs, strict=True)}


def _queries_off(job: _Job, inputs: list[Tensor], o: Tensor) -> float:
    """Return the relative error of o at some queries of the full size, the last and the first among them.

    Each is the last query of a call on its own window alone.
    """
    shape = job.shape
    reach = max(shape.window1, shape.window2)
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(0, shape.tokens, (CHECKED_QUERIES,), generator=generator).tolist()
    found, wanted = [], []
    for number, i in enumerate([0, shape.tokens - 1, *draws]):
        b, kv = number % shape.batch, number % shape.kv_heads
        group = shape.heads // shape.kv_heads
        head = kv * group + number % group
        first = max(0, i - reach + 1)
        q, *keys = inputs
        window = [x[b : b + 1, first : i + 1, kv : kv + 1].float() for x in keys]
        query = q[b : b + 1, i : i + 1, head : head + 1].float()
        lengths = torch.tensor([i + 1 - first], device=job.device)
        wanted.append(job.decode([query, *window], lengths, "torch").flatten())
        found.append(o[b, i, head].float())
    return _off(torch.stack(found), torch.stack(wanted))
