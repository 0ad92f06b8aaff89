"""What a model must know about its task."""

import torch

from trivium.model.base import ModelConfig, ModelContext
from trivium.registry import UserError
from trivium.tasks.base import Task


def model_context(task: Task, config: ModelConfig) -> ModelContext:
    """Return the context in which `config` is built for `task`; a length that the config names wins if it suffices.

    Raises UserError when the model cannot serve the task: it is too short, its position scheme finds no ids in the
    task's alphabet, or one of its mixers does not fit its width.
    """
    wanted = getattr(config, "max_length", None)
    if wanted is not None and wanted < task.max_length:
        raise UserError(
            f"model.max_length: {wanted} is shorter than the task's longest sequence; "
            f"allowed: {task.max_length} or more"
        )
    context = ModelContext(
        vocab_size=len(task.alphabet),
        max_length=wanted or task.max_length,
        digit_ids=task.alphabet.digit_ids,
    )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        config.build(context)
    return context
