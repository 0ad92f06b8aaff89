"""Teacher-forced scores: the model reads the right answer and is asked for each next token of it.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trivium.generate.engine import evaluating
from trivium.generate.sampling import device_of
from trivium.model.base import LanguageModel
from trivium.tasks.base import ANSWER, CHAIN, PROMPT, Batch, Split, Task

LOGITS = 2**29  # that one forward pass of a score may make


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
    """Return {"loss", "answer_loss", "token_accuracy", "exact_match", "count"} on the problems at `indices` of `split`.

    The loss (nats) is the mean over scored targets, weighted as in training, and "answer_loss" that over the answers'
    own tokens, behind any chain of thought, their end symbol included; None where no answer is asked for. Accuracy
    counts the targets of the answer, and of the chain unless `chain_loss` is false; a row matches exactly when the most
    probable token is right at all of them. The prompt never counts for either. `batch` rows are read at a time and do
    not change the result; the model is put into eval mode and back. `autocast` is entered around the forward passes.
    What is read and asked for is what the model was trained on, see `Decoding`.
    """
    indices = np.asarray(indices, dtype=np.int64)
    batches = (
        model.decoding.view(task.gather(split, indices[start : start + batch], stage), task.alphabet.pad_id)
        for start in range(0, len(indices), batch)
    )
    return score_batches(model, batches, chain_loss=chain_loss, prompt_loss=prompt_loss, autocast=autocast)


def score_batches(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    chain_loss: bool = True,
    prompt_loss: bool = False,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Return what `teacher_forced` does, for batches that are seen as the model's `decoding` does."""
    with evaluating(model), torch.no_grad(), autocast or nullcontext():
        rows = [
            _score(model, part, chain_loss, prompt_loss)
            for batch in batches
            for part in _parts(batch, model.context.vocab_size)
        ]
    if not rows:
        raise ValueError("there is no problem to score")
    loss_sum, weight_sum, right, scored, answer_sum, answers = torch.cat(rows, dim=1).cpu().unbind()
    return {
        "loss": float(loss_sum.sum() / weight_sum.sum()),
        "answer_loss": float(answer_sum.sum() / answers.sum()) if answers.any() else None,
        "token_accuracy": float(right.sum() / scored.sum()),
        "exact_match": float((right == scored).double().mean()),
        "count": len(right),
    }


def _parts(batch: Batch, vocab_size: int) -> list[Batch]:
    """Return the batch in parts of rows whose logits fit the memory: with a large vocabulary a row's are many."""
    rows = max(1, LOGITS // max(1, batch.tokens_BT.shape[1] * vocab_size))
    if rows >= len(batch):
        return [batch]
    return [batch.take(np.arange(start, min(start + rows, len(batch)))) for start in range(0, len(batch), rows)]


def _score(model: LanguageModel, batch: Batch, chain_loss: bool, prompt_loss: bool) -> Tensor:
    """Return (6, B): the weighted loss of each row, its weights, its right targets and its scored targets; the loss of
    the answer's own tokens, and how many they are."""
    device = device_of(model)
    tokens_BT = torch.from_numpy(batch.tokens_BT).to(device)
    targets_BT = torch.from_numpy(batch.targets_BT).to(device)
    weights_BT = torch.from_numpy(loss_weights(batch, chain_loss=chain_loss, prompt_loss=prompt_loss)).to(device)
    regions = (ANSWER, CHAIN) if chain_loss else (ANSWER,)
    counted_BT = torch.from_numpy(np.isin(batch.regions_BT, regions) & (batch.weights_BT > 0)).to(device)
    packed = {} if batch.documents_BT is None else {"documents_BT": torch.from_numpy(batch.documents_BT).to(device)}
    logits_BTV, _ = model(tokens_BT, **packed)
    # Double sums, so that the order of the rows and their padding stay below what a reader sees.
    losses_BT = cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    losses_BT = losses_BT.view_as(weights_BT).double()
    answer_BT = torch.from_numpy((batch.regions_BT == ANSWER) & (batch.weights_BT > 0)).to(device)
    answer_B = torch.where(answer_BT, losses_BT, 0).sum(1)
    losses_BT = losses_BT * weights_BT
    right_BT = (logits_BTV.argmax(-1) == targets_BT) & counted_BT
    sums = (losses_BT.sum(1), weights_BT.double().sum(1), right_BT.sum(1).double(), counted_BT.sum(1).double())
    return torch.stack((*sums, answer_B, answer_BT.sum(1).double()))
