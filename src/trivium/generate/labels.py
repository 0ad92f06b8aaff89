"""Answers of a task that labels what it reads: the whole prompt in one pass, and the most probable label of each place.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trivium.config import UserError
from trivium.generate.engine import check_length, evaluating, longest_input
from trivium.generate.sampling import Generation, device_of
from trivium.model.base import LanguageModel


def read_labels(
    model: LanguageModel, prompts: Sequence[Sequence[int]], *, batch: int = 256, temperature: float = 0.0
) -> list[Generation]:
    """Return one token, the most probable, and its probability for each token of each of `prompts`.

    `batch` rows are read at a time. Raises UserError for an empty prompt, one longer than the model reads, and a
    temperature other than 0, since labels do not depend on each other and nothing is sampled.
    """
    if temperature != 0:
        raise UserError(f"temperature {temperature}: this task's labels are read, not sampled; allowed: 0")
    room = longest_input(model)
    for prompt in prompts:
        check_length(len(prompt), room)
    results: dict[int, Generation] = {}
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            longest = max(len(prompts[row]) for row in rows)
            # What stands behind a row is read after it, and changes nothing before.
            tokens_BT = np.array(
                [[*prompts[row], *[0] * (longest - len(prompts[row]))] for row in rows], dtype=np.int64
            )
            chosen_BT, shares_BT = _most_probable(model, tokens_BT)
            for row, chosen, shares in zip(rows, chosen_BT.tolist(), shares_BT.tolist(), strict=True):
                length = len(prompts[row])
                results[row] = Generation(chosen[:length], shares[:length], finished=True)
    return [results[row] for row in range(len(prompts))]


def _most_probable(model: LanguageModel, tokens_BT: np.ndarray) -> tuple[Tensor, Tensor]:
    logits_BTV, _ = model(torch.from_numpy(tokens_BT).to(device_of(model)))
    best_BT, chosen_BT = logits_BTV.float().max(-1)
    return chosen_BT, (best_BT - logits_BTV.float().logsumexp(-1)).exp()
