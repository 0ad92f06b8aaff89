"""What is asked of the rows of a batch and what is found, whoever answers: `eager.py` or `fixed.py`.

A model whose logits at place t are those of token t + R gives R tokens a pass: behind a prompt of P tokens the first is
read at place P - R, while the prompt is still being read. With R = 1 this is ordinary decoding.

Shapes: B rows, T tokens of the longest prompt, R tokens of a pass, N tokens of an answer, V symbols.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivium.generate.sampling import sample, uniforms


@dataclass(frozen=True)
class Wanted:
    """What is asked of every row of a batch: the token that ends it, how it is drawn, whether shares are wanted."""

    end_id: int
    temperature: float = 0.0
    seed: int = 0
    probabilities: bool = False


@dataclass(frozen=True)
class Prompts:
    """Left-aligned prompts: tokens (B, T), their lengths, the tokens each may get, and each row's place in the call."""

    tokens_BT: Tensor
    lengths_B: np.ndarray
    budgets_B: np.ndarray
    rows_B: np.ndarray

    @property
    def ragged(self) -> bool:
        return bool((self.lengths_B != self.tokens_BT.shape[1]).any())


class Found(NamedTuple):
    """Tokens (B, N); if wanted, the model's own probability of each; how many each row has (B,), if that is known, and
    then end tokens stand behind them."""

    tokens_BN: Tensor
    shares_BN: Tensor | None
    counts_B: Tensor | None = None


def room_needed(lengths_B: np.ndarray, budgets_B: np.ndarray, per_pass: int) -> int:
    """Return the tokens that the longest row reads: the prompt, and all passes but the last."""
    passes_B = np.maximum(-(-budgets_B // per_pass), 1)
    return int((lengths_B + (passes_B - 1) * per_pass).max())


def choose(logits_BRV: Tensor, wanted: Wanted, uniform_BR: Tensor | None) -> Tensor:
    """Return the tokens (B, R) of a pass: the most probable, or drawn at the given numbers."""
    if uniform_BR is None:
        return logits_BRV.argmax(-1)
    return sample(logits_BRV.flatten(0, 1), wanted.temperature, uniform_BR.flatten()).view(uniform_BR.shape)


def shares_of(logits_BRV: Tensor, chosen_BR: Tensor) -> Tensor:
    """Return the model's own probability (B, R) of each chosen token."""
    return logits_BRV.double().softmax(-1).gather(2, chosen_BR[..., None])[..., 0]


def uniforms_of(wanted: Wanted, rows_B: np.ndarray, count: int, device: torch.device) -> Tensor | None:
    """Return the numbers (B, N) at which rows draw, or None where they are greedy."""
    return uniforms(wanted.seed, rows_B, count).to(device) if wanted.temperature > 0 else None
