"""Time the backends of gated linear attention and the gated delta rule, after their results were found right.

Rounds alternate between the backends, so that what else the machine does slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from trivium.bench.gates import WrongResult
from trivium.bench.memory import memory_now, memory_peak, wait
from trivium.bench.threads import processor_threads
from trivium.ops import dispatch, gated_delta_rule, gated_linear_attention

# Absolute and relative to the largest entry, as everywhere in the tests.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class RecurrenceShape:
    """Sizes of one measurement of an operator with a running state."""

    batch: int = 4
    tokens: int = 512
    heads: int = 4
    head_width: int = 64

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.tokens} H{self.heads} K{self.head_width}"


def bench_recurrence(
    operator: Literal["gated_linear_attention", "gated_delta_rule"],
    shapes: Sequence[RecurrenceShape] = (RecurrenceShape(),),
    backends: Sequence[str] | None = None,
    *,
    repeats: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return {"operator", "device", "threads", "rows"}; a row is one shape with one backend.

    A row holds "forward_backward_seconds" (the median of "seconds"; a state goes in and comes out),
    "tokens_per_second", "peak_bytes" above the inputs, and "times_as_fast", the median over rounds of the reference's
    seconds over this backend's. Raises UserError for a backend that is missing and WrongResult for one that is wrong.
    """
    available = [name for name, missing in dispatch.backends(operator).items() if missing is None]
    chosen = [name for name in (available if backends is None else backends) if name != "reference"]
    for name in chosen:
        dispatch.choose(operator, name, device)
    with processor_threads(threads) as used:
        rows: list[dict[str, Any]] = []
        for shape in shapes:
            rows += _measure(operator, shape, ["reference", *chosen], repeats, device, on_progress)
    return {"operator": operator, "device": device, "threads": used, "rows": rows}


def _measure(
    operator: str,
    shape: RecurrenceShape,
    backends: list[str],
    repeats: int,
    device: str,
    on_progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    inputs = _inputs(operator, shape, device)
    expected = _forward_backward(operator, "reference", inputs)
    peaks = {name: _peak(operator, name, inputs, device) for name in backends}
    for name in backends[1:]:
        _refuse_a_wrong_result(_forward_backward(operator, name, inputs), expected, name)
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for number in range(repeats):
        on_progress(f"{operator}, {shape.name}: round {number + 1} of {repeats}")
        for name in backends:
            wait(device)
            start = time.perf_counter()
            _forward_backward(operator, name, inputs)
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "shape": shape.name,
            **asdict(shape),
            "backend": name,
            "forward_backward_seconds": statistics.median(seconds[name]),
            "tokens_per_second": shape.batch * shape.tokens / statistics.median(seconds[name]),
            "peak_bytes": peaks[name],
            "times_as_fast": statistics.median(
                slow / fast for slow, fast in zip(seconds["reference"], seconds[name], strict=True)
            ),
            "seconds": seconds[name],
        }
        for name in backends
    ]


def _inputs(operator: str, shape: RecurrenceShape, device: str) -> dict[str, Tensor]:
    """Return the operator's arguments with decays and strengths as a young model has them."""
    generator = torch.Generator().manual_seed(0)
    gates, width = (shape.batch, shape.tokens, shape.heads), shape.head_width
    drawn = {name: torch.randn(*gates, width, generator=generator) for name in ("q", "k", "v")}
    drawn["k"] = functional.normalize(drawn["k"], dim=-1)
    if operator == "gated_delta_rule":
        drawn["beta"] = torch.rand(*gates, generator=generator)
        drawn["log_decay"] = -0.1 * torch.rand(*gates, generator=generator)
    else:
        drawn["log_decay"] = -0.1 * torch.rand(*gates, width, generator=generator)
    drawn["state"] = torch.randn(shape.batch, shape.heads, width, width, generator=generator)
    return {name: tensor.to(device).requires_grad_() for name, tensor in drawn.items()}


def _forward_backward(operator: str, backend: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    function: Callable[..., tuple[Tensor, Tensor]] = gated_linear_attention
    if operator == "gated_delta_rule":
        function = gated_delta_rule
    o, state = function(**inputs, backend=backend)
    gradients = [inputs["v"].detach(), inputs["state"].detach()]
    return [o.detach(), state.detach(), *torch.autograd.grad([o, state], list(inputs.values()), gradients)]


def _refuse_a_wrong_result(found: list[Tensor], expected: list[Tensor], backend: str) -> None:
    for index, (tensor, wanted) in enumerate(zip(found, expected, strict=True)):
        error = float((tensor - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE[wanted.dtype]:
            raise WrongResult(
                f"backend {backend}: result {index} is off by {error:.1e} of its largest entry; not timed"
            )


def _peak(operator: str, backend: str, inputs: dict[str, Tensor], device: str) -> int:
    _forward_backward(operator, backend, inputs)  # loads the libraries
    before = memory_now(device)
    _forward_backward(operator, backend, inputs)
    return max(0, memory_peak(device) - before)
