"""What a decoder gives and how it draws tokens. Shapes: B rows, N tokens that may be generated, V vocabulary."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trivium.tasks.counter_random import GOLDEN, mix


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt; the end token, if it came (`finished`), is the last of `tokens`.

    `probabilities` are those that the model itself (temperature 1) gave to each of the tokens.
    """

    tokens: list[int]
    probabilities: list[float] | None
    finished: bool


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters; the CPU when it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def computing_in(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which a float32 model makes its products in `dtype`.

    On a GPU no weight is kept in it: a captured graph would read it after its memory is another's.
    """
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=device.type != "cuda")


def sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> Tensor:
    """Return token ids (B,) drawn from softmax(logits / temperature) by inverting its distribution at `uniform_B`."""
    scaled_BV = logits_BV.double()
    # Subtracting first keeps tiny temperatures finite.
    scaled_BV = (scaled_BV - scaled_BV.amax(-1, keepdim=True)) / temperature
    cumulative_BV = scaled_BV.exp().cumsum(-1)
    chosen_B = (cumulative_BV <= uniform_B[:, None] * cumulative_BV[:, -1:]).sum(-1)
    return chosen_B.clamp_max(logits_BV.shape[-1] - 1)


def uniforms(seed: int, rows: np.ndarray, num_steps: int) -> Tensor:
    """Return float64 numbers (B, N) in [0, 1) that depend on (seed, row, step) alone, 40 bits each.

    Source: SplitMix64 as a counter-based generator, see `tasks.counter_random`.
    """
    key = mix(np.array([seed % 2**64], dtype=np.uint64) + GOLDEN)
    row_B1 = mix(key + rows.astype(np.uint64) + GOLDEN)[:, None]
    bits_BN = mix(row_B1 + np.arange(num_steps, dtype=np.uint64) + GOLDEN)
    # 40 bits, so that the product with a sum of probabilities stays below that sum.
    return torch.from_numpy((bits_BN >> np.uint64(24)).astype(np.float64) * 2.0**-40)
