"""Build a model from whatever describes one: a recipe, a run's config, or a model config with its context."""

from collections.abc import Mapping, Sequence
from typing import Any

from trivium.config import from_dict
from trivium.model.base import LanguageModel, ModelConfig, ModelContext
from trivium.model.context import model_context
from trivium.registry import UserError, nearest
from trivium.tasks.base import TaskConfig

_SECTIONS = ("task", "model", "train", "evaluate", "track", "compare")


def build(config: Any, context: ModelContext | TaskConfig | None = None) -> LanguageModel:
    """Return a new model, initialised from torch's generator.

    `config` is a recipe as a mapping (its sections task, model and evaluate.lengths are read), an object with `task`
    and `model` such as RunConfig, or a ModelConfig or the mapping of one, which then needs `context`: a ModelContext,
    or the task's config. Raises UserError where keys, values or the fit of model and task are wrong.
    """
    if context is None:
        task, model, lengths = _sections(config)
        return model.build(model_context(task.build(), model, lengths))
    model = config if isinstance(config, ModelConfig) else from_dict(ModelConfig, config, "model")
    if isinstance(context, TaskConfig):
        context = model_context(context.build(), model)
    return model.build(context)


def _sections(config: Any) -> tuple[TaskConfig, ModelConfig, Sequence[int]]:
    if isinstance(config, Mapping):
        for key in config:
            if key not in _SECTIONS:
                raise UserError(f"{key}: unknown section; {nearest(str(key), list(_SECTIONS))}")
        if "task" not in config:
            raise UserError("task: missing; a model is built for a task, or give its context")
        task, model = config["task"], config.get("model", {})
        evaluation = config.get("evaluate") or {}
        if isinstance(evaluation, Mapping):
            longest = max(evaluation.get("pairs", ()), default=None)
            lengths = (*evaluation.get("lengths", ()), *(() if longest is None else (longest,)))
        else:
            lengths = evaluation.longest
    else:
        task, model = getattr(config, "task", None), getattr(config, "model", None)
        lengths = getattr(getattr(config, "evaluate", None), "longest", ())
        if not isinstance(task, TaskConfig) or not isinstance(model, ModelConfig):
            raise UserError(
                f"cannot build a model from {type(config).__name__}; give a recipe, or a model config and context"
            )
    return (
        task if isinstance(task, TaskConfig) else from_dict(TaskConfig, task, "task"),
        model if isinstance(model, ModelConfig) else from_dict(ModelConfig, model, "model"),
        lengths,
    )
