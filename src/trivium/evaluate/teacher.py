"""Teacher-forced scores: the model reads the right answer and is asked for each next token of it.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.generate.engine import device_of, evaluating
from trivium.model.base import LanguageModel
from trivium.tasks.base import ANSWER, CHAIN, PROMPT, Batch, Split, Task


def loss_weights(batch: Batch, *, chain_loss: bool = True, prompt_loss: bool = False) -> np.ndarray:
    """Return float32 weights (B, T) of the targets: the task's own, the chain masked or the prompt added on request."""
    weights_BT = batch.weights_BT
    if not chain_loss:
        weights_BT = np.where(batch.regions_BT == CHAIN, np.float32(0), weights_BT)
    if prompt_loss:
        weights_BT = np.where(batch.regions_BT == PROMPT, np.float32(1), weights_BT)
    return weights_BT


def teacher_forced(
    model: LanguageModel,
    task: Task,
    split: Split,
    indices: Sequence[int] | np.ndarray,
    *,
    batch: int = 256,
    chain_loss: bool = True,
    prompt_loss: bool = False,
    autocast: AbstractContextManager[Any] | None = None,
    stage: int = 0,
) -> dict[str, Any]:
    """Return {"loss", "token_accuracy", "exact_match", "count"} on the problems at `indices` of `split`.

    The loss (nats) is the mean over scored targets, weighted as in training. Accuracy counts the targets of the
    answer, and of the chain unless `chain_loss` is false; a row matches exactly when the most probable token is
    right at all of them. The prompt never counts for either. `batch` rows are read at a time and do not change
    the result; the model is put into eval mode and back. `autocast` is entered around the forward passes.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if len(indices) == 0:
        raise ValueError("teacher_forced was given no problems")
    rows = []
    with evaluating(model), torch.no_grad(), autocast or nullcontext():
        for start in range(0, len(indices), batch):
            chunk = task.gather(split, indices[start : start + batch], stage)
            rows.append(_score(model, chunk, chain_loss, prompt_loss))
    loss_sum, weight_sum, right, scored = torch.cat(rows, dim=1).double().cpu().unbind()
    return {
        "loss": float(loss_sum.sum() / weight_sum.sum()),
        "token_accuracy": float(right.sum() / scored.sum()),
        "exact_match": float((right == scored).double().mean()),
        "count": len(indices),
    }


def _score(model: LanguageModel, batch: Batch, chain_loss: bool, prompt_loss: bool) -> Tensor:
    """Return (4, B): the weighted loss of each row, its weights, its right targets and its scored targets."""
    device = device_of(model)
    tokens_BT = torch.from_numpy(batch.tokens_BT).to(device)
    targets_BT = torch.from_numpy(batch.targets_BT).to(device)
    weights_BT = torch.from_numpy(loss_weights(batch, chain_loss=chain_loss, prompt_loss=prompt_loss)).to(device)
    regions = (ANSWER, CHAIN) if chain_loss else (ANSWER,)
    counted_BT = torch.from_numpy(np.isin(batch.regions_BT, regions) & (batch.weights_BT > 0)).to(device)
    logits_BTV, _ = model(tokens_BT)
    # Double sums, so that the order of the rows and their padding stay below what a reader sees.
    losses_BT = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    losses_BT = losses_BT.view_as(weights_BT).double() * weights_BT
    right_BT = (logits_BTV.argmax(-1) == targets_BT) & counted_BT
    sums = (losses_BT.sum(1), weights_BT.double().sum(1), right_BT.sum(1).double(), counted_BT.sum(1).double())
    return torch.stack(sums)
