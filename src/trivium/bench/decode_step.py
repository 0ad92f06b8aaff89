"""Time one step of generation of every mixer against what its FLOPs predict.

Predicted are the FLOPs of `flops_per_token` at rates measured in the same run: those of the mixer's weights at the rate
of one linear map of so many weights for the same rows; the rest, its state's, at the rate of a batched product that
reads as many numbers as the state holds, each used as often as the mixer uses it (a matrix-vector product where a
number meets a few FLOPs). Rounds take turns, so that what else the machine does meets both.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivium.bench.memory import wait
from trivium.bench.threads import processor_threads
from trivium.mixers.base import MIXERS, Mixer, MixerConfig, MixerContext
from trivium.model.layers import format_layers, parse_layers
from trivium.registry import UserError

DEFAULT_EXTRA = ("attention(window=128)", "gated_deltanet(householder=4)")
ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class StepShape:
    """Sizes of one measurement of a mixer's step."""

    width: int = 256
    heads: int = 4
    batch: int = 64
    context: int = 512


def bench_decode_steps(
    shape: StepShape = StepShape(),
    mixers: Sequence[str] = (),
    *,
    repeats: int = 20,
    device: str = "cpu",
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return {"operator", "device", "threads", "rows"}; a row is one mixer: every registered one and two variants, or
    those that `mixers` names as layers.

    A row holds "milliseconds" (the median of a step of all rows, whose states have seen `context` tokens),
    "predicted_milliseconds", "ratio" (the median over rounds), and the FLOPs of weights and state with their rates.
    """
    names = tuple(mixers) or (*MIXERS.names(), *DEFAULT_EXTRA)
    with processor_threads(threads) as used:
        rows = []
        for name in names:
            layers = parse_layers(name)
            if len(layers) != 1:
                raise UserError(f"mixer {name!r}: name one layer at a time")
            on_progress(f"step of {name}")
            with torch.inference_mode():
                rows.append(_measure(layers[0], shape, repeats, torch.device(device)))
    return {"operator": "decode_step", "device": device, "threads": used, **vars(shape), "rows": rows}


def _measure(config: MixerConfig, shape: StepShape, repeats: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    context = MixerContext(width=shape.width, heads=shape.heads, max_length=shape.context)
    mixer = config.build(context).to(device).eval()
    weights = sum(parameter.numel() for parameter in mixer.parameters() if parameter.ndim == 2)
    weight_flops = 2.0 * shape.batch * weights
    state = mixer.init_state(shape.batch, shape.context, device, torch.float32)
    numbers = sum(tensor[0].numel() for tensor in state.tensors() if tensor.is_floating_point())
    state_flops = shape.batch * _state_flops(config, context, shape.context, weights)
    product, product_flops = _product(shape, numbers, state_flops, device)
    calls = {"step": _step(mixer, state, shape, device), "linear": _linear(shape, weights, device), "product": product}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    times = {name: _calls_in_a_round(call, device) for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(_seconds(call, times[name], device))
    predicted = [
        mine + theirs * state_flops / product_flops
        for mine, theirs in zip(taken["linear"], taken["product"], strict=True)
    ]
    return {
        "mixer": format_layers((config,)),
        "weight_flops": weight_flops,
        "state_flops": state_flops,
        "weight_gflops_per_second": weight_flops / statistics.median(taken["linear"]) / 1e9,
        "state_gflops_per_second": product_flops / statistics.median(taken["product"]) / 1e9,
        "milliseconds": 1e3 * statistics.median(taken["step"]),
        "predicted_milliseconds": 1e3 * statistics.median(predicted),
        "ratio": statistics.median(mine / theirs for mine, theirs in zip(taken["step"], predicted, strict=True)),
    }


def _state_flops(config: MixerConfig, context: MixerContext, length: int, weights: int) -> float:
    """Return the FLOPs of one token behind `length - 1` others, those of its weights left out."""
    totals = [tokens * config.flops_per_token(context, tokens) for tokens in (length - 1, length)]
    return totals[1] - totals[0] - 2.0 * weights


def _step(mixer: Mixer, state: Any, shape: StepShape, device: torch.device) -> Callable[[], None]:
    """Return the step that fills the room of every row, to be done again and again."""
    x_B1D = torch.randn(shape.batch, 1, shape.width, device=device)
    held = [state]
    for start in range(0, shape.context - 1, 32):
        tokens = min(32, shape.context - 1 - start)
        _, held[0] = mixer(torch.randn(shape.batch, tokens, shape.width, device=device), held[0])
    kept = [(tensor, tensor.clone()) for tensor in held[0].tensors() if not tensor.is_floating_point()]

    def step() -> None:
        _, held[0] = mixer(x_B1D, held[0])
        for counter, value in kept:
            counter.copy_(value)

    return step


def _linear(shape: StepShape, weights: int, device: torch.device) -> Callable[[], None]:
    x_BD = torch.randn(shape.batch, shape.width, device=device)
    weight = torch.randn(max(1, round(weights / shape.width)), shape.width, device=device)

    def linear() -> None:
        torch.nn.functional.linear(x_BD, weight)

    return linear


def _product(
    shape: StepShape, numbers: int, state_flops: float, device: torch.device
) -> tuple[Callable[[], None], float]:
    """Return a batched product over as many numbers as the states hold, and its FLOPs."""
    head_width = shape.width // shape.heads
    pairs, columns = shape.batch * shape.heads, max(1, numbers // shape.width)
    uses = state_flops / (2 * shape.batch * max(numbers, 1))
    rows = 1 if uses < 8 else round(uses)
    left: Tensor = torch.randn(pairs, rows, head_width, device=device)
    right: Tensor = torch.randn(pairs, columns, head_width, device=device).mT  # as keys lie: a row each

    def product() -> None:
        torch.bmm(left, right)

    return product, 2.0 * pairs * rows * head_width * columns


def _calls_in_a_round(call: Callable[[], None], device: torch.device) -> int:
    _seconds(call, 2, device)  # loads the libraries
    seconds = _seconds(call, 1, device)
    return max(1, min(200, round(ROUND_SECONDS / max(seconds, 1e-6))))


def _seconds(call: Callable[[], None], times: int, device: torch.device) -> float:
    # With one thread what the process computed is what a machine without other work would take.
    now = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait(device)
    start = now()
    for _ in range(times):
        call()
    wait(device)
    return (now() - start) / times
