"""Time operators and measure their peak memory, after their results were found right.

Each measurement runs in a process of its own, so that its peak memory is its own. The reference runs first and leaves
its output and gradients; a backend that disagrees is refused, not timed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trivium.bench.gates import WrongResult
from trivium.bench.memory import memory_now, memory_peak, wait
from trivium.ops import dispatch, simplicial_attention
from trivium.ops.pairs import allowed_pairs
from trivium.registry import UserError

# Absolute and relative to the largest entry, as everywhere in the tests.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

WRONG = 3  # the exit status of a measuring process that got a wrong result


@dataclass(frozen=True)
class SimplicialShape:
    """Sizes of one measurement of 2-simplicial attention."""

    batch: int = 2
    tokens: int = 512
    heads: int = 4
    kv_heads: int = 4
    head_width: int = 32
    window1: int = 128
    window2: int = 16

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        return f"B{self.batch} T{self.tokens} {heads} D{self.head_width} {self.window1}x{self.window2}"

    def reference_bytes(self, tokens: int) -> int:
        """Return about what the reference holds at its peak in float32: three tensors of all triples."""
        return 4 * 3 * self.batch * self.heads * tokens**3

    def flops(self) -> int:
        """Return 4 D per allowed (head, j, k) forward, and 2.5 times that backward."""
        triples = allowed_pairs(self.tokens, self.window1, self.window2)
        return int(3.5 * 4 * self.head_width * self.heads * self.batch * triples)


def bench_simplicial(
    shapes: Sequence[SimplicialShape] = (SimplicialShape(),),
    backends: Sequence[str] | None = None,
    *,
    repeats: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    form: str = "trilinear",
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return {"operator", "device", "threads", "form", "rows"}; a row is one shape with one backend.

    A row holds "forward_backward_seconds" (the median), "tflops" (FLOPs of the allowed triples, see
    SimplicialShape.flops), "peak_bytes" above the inputs, and "times_as_fast" and "share_of_memory" against the
    reference of the same shape. Where the reference needs more memory than there is, it is compared on fewer tokens
    and its row says "not run". Raises UserError for a backend that is missing and WrongResult for one that is wrong.
    """
    available = [name for name, missing in dispatch.backends("simplicial").items() if missing is None]
    chosen = available if backends is None else list(backends)
    for name in chosen:
        dispatch.choose("simplicial", name, device)
    threads = torch.get_num_threads() if threads is None else threads
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        checked = _checked_tokens(shape)
        job = {"shape": asdict(shape), "checked": checked, "threads": threads, "device": device, "form": form}
        with tempfile.TemporaryDirectory() as folder:
            job |= {"expected": str(Path(folder) / "reference.safetensors"), "repeats": repeats}
            truth: dict[str, Any] = {}
            for name in ["reference", *(name for name in chosen if name != "reference")]:
                on_progress(f"{shape.name}: {name}")
                found = _in_a_process(job | {"backend": name})
                truth = found if name == "reference" else truth
                rows.append(_row(shape, name, found, truth, checked))
    return {"operator": "simplicial", "device": device, "threads": threads, "form": form, "rows": rows}


def _row(
    shape: SimplicialShape, name: str, found: dict[str, Any], truth: dict[str, Any], checked: int
) -> dict[str, Any]:
    row = {"shape": shape.name, **asdict(shape), "backend": name, "checked_tokens": checked, **found}
    if "seconds" in found:
        row["tflops"] = shape.flops() / found["forward_backward_seconds"] / 1e12
        if "seconds" in truth:
            row["times_as_fast"] = truth["forward_backward_seconds"] / found["forward_backward_seconds"]
            row["share_of_memory"] = found["peak_bytes"] / max(truth["peak_bytes"], 1)
    else:
        row["not_run"] = f"needs about {shape.reference_bytes(shape.tokens) / 2**30:.0f} GiB"
    return row


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _checked_tokens(shape: SimplicialShape) -> int:
    """Return on how many tokens the reference fits into memory."""
    tokens = shape.tokens
    while tokens > 1 and shape.reference_bytes(tokens) > 0.9 * _available_bytes():
        tokens //= 2
    return tokens


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "trivium.bench.ops", json.dumps(job)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    )
    if done.returncode in (2, WRONG):
        refused = UserError if done.returncode == 2 else WrongResult
        raise refused(done.stderr.strip().splitlines()[-1])
    if done.returncode != 0:
        raise RuntimeError(f"the measurement of {job['backend']} ended with {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def _inputs(shape: SimplicialShape, tokens: int, device: str, form: str) -> list[Tensor]:
    """Return q, k1, k2, v1, v2 (no v2 if factorized) and the gradient of o; fewer tokens are the first ones."""
    generator = torch.Generator().manual_seed(0)
    heads = [shape.heads, *[shape.kv_heads] * (3 if form == "factorized" else 4), shape.heads]
    drawn = (torch.randn(shape.batch, shape.tokens, count, shape.head_width, generator=generator) for count in heads)
    return [tensor[:, :tokens].contiguous().to(device).requires_grad_() for tensor in drawn]


def _forward_backward(shape: SimplicialShape, backend: str, form: str, inputs: list[Tensor]) -> list[Tensor]:
    *leaves, gradient = inputs
    q, k1, k2, v1 = leaves[:4]
    v2 = None if form == "factorized" else leaves[4]
    window1, window2 = shape.window1, shape.window2
    o = simplicial_attention(q, k1, k2, v1, v2, window1=window1, window2=window2, form=form, backend=backend)
    return [o.detach(), *torch.autograd.grad(o, leaves, gradient.detach())]


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    shape, backend, form, device = SimplicialShape(**job["shape"]), job["backend"], job["form"], job["device"]
    tiny = SimplicialShape(1, 4, shape.heads, shape.kv_heads, shape.head_width, 2, 2)
    _forward_backward(tiny, backend, form, _inputs(tiny, 4, device, form))  # loads the libraries
    is_reference = backend == "reference"
    inputs = _inputs(shape, job["checked"], device, form)
    before = memory_now(device)
    found = _forward_backward(shape, backend, form, inputs)
    peak = memory_peak(device) - before
    if is_reference:
        save_file({str(index): tensor.cpu().contiguous() for index, tensor in enumerate(found)}, job["expected"])
        if job["checked"] < shape.tokens:
            return {}
    else:
        _refuse_a_wrong_result(found, load_file(job["expected"]), backend)
        if job["checked"] < shape.tokens:
            inputs = _inputs(shape, shape.tokens, device, form)
            before = memory_now(device)
            _forward_backward(shape, backend, form, inputs)
            peak = memory_peak(device) - before
    del found
    seconds: list[float] = []
    # Half a minute is enough of a backend as slow as the reference.
    while not seconds or (len(seconds) < job["repeats"] and sum(seconds) < 30):
        wait(device)
        start = time.perf_counter()
        _forward_backward(shape, backend, form, inputs)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return {
        "forward_backward_seconds": statistics.median(seconds),
        "seconds": seconds,
        "peak_bytes": peak,
    }


def _refuse_a_wrong_result(found: list[Tensor], expected: dict[str, Tensor], backend: str) -> None:
    names = ("o", "dq", "dk1", "dk2", "dv1", "dv2")
    for index, tensor in enumerate(found):
        wanted = expected[str(index)]
        error = float((tensor.cpu() - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE[wanted.dtype]:
            raise WrongResult(
                f"backend {backend}: {names[index]} is off by {error:.1e} of its largest entry; not timed"
            )


if __name__ == "__main__":
    try:
        print(json.dumps(_measure(json.loads(sys.argv[1]))))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except WrongResult as error:
        print(error, file=sys.stderr)
        sys.exit(WRONG)
