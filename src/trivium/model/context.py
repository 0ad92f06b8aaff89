"""What a model must know about its task."""

from collections.abc import Sequence

import torch

from trivium.model.base import ModelConfig, ModelContext
from trivium.registry import UserError
from trivium.tasks.base import Task


def model_context(task: Task, config: ModelConfig, lengths: Sequence[int] = ()) -> ModelContext:
    """Return the context in which `config` is built for `task`; a length that the config names wins if it suffices.

    `lengths` are those of problems, also beyond the task's own, that the model is to be scored on.
    Raises UserError when the model cannot serve the task: it is too short, its position scheme finds no ids in the
    task's alphabet, or one of its mixers does not fit its width.
    """
    wanted = getattr(config, "max_length", None)
    needed = max([task.max_length, *(_tokens_at(task, length) for length in lengths)])
    if wanted is not None and wanted < needed:
        whose = "the task's longest sequence" if needed == task.max_length else "the longest of evaluate.lengths"
        raise UserError(f"model.max_length: {wanted} is shorter than {whose}; allowed: {needed} or more")
    if task.packs_documents and config.document_multiple > 1:
        raise UserError(
            f"task.separate: this model begins documents at multiples of {config.document_multiple} tokens only, and "
            "those of a text begin anywhere; allowed: false"
        )
    context = ModelContext(
        vocab_size=len(task.alphabet),
        max_length=wanted or needed,
        digit_ids=task.alphabet.digit_ids,
        least_first=task.least_first,
        closing_ids=tuple(map(task.alphabet.id_of, task.closing)),
    )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        config.build(context)
    return context


def _tokens_at(task: Task, length: int) -> int:
    try:
        return task.at_length(length).max_length
    except UserError as error:
        raise UserError(f"evaluate.lengths: {length}: {error}") from None
