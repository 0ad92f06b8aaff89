"""The end of a run: the model is saved and scored, and result.json says what became of it."""

import json
from typing import Any

import torch

from trivium.config import to_dict
from trivium.evaluate.answers import evaluate
from trivium.model.base import LanguageModel, ModelContext
from trivium.model.card import training_record
from trivium.model.folder import record_training, save_model
from trivium.tasks.base import Task
from trivium.train.groups import grouped, num_weights
from trivium.train.precision import Precision
from trivium.train.run import Run
from trivium.train.state import Position


def finish(
    run: Run,
    model: LanguageModel,
    task: Task,
    context: ModelContext,
    at: Position,
    precision: Precision,
    peak: int | None,
) -> dict[str, Any]:
    """Save and score the trained model; return what result.json holds."""
    config = run.config
    save_model(run.model, model, config.task)
    answers: list[dict[str, Any]] | None = [] if config.evaluate.keep_answers else None
    dtype = precision.dtype if config.evaluate.precision == "training" else torch.float32
    scored: dict[str, Any] = {
        "split": "test",
        "chain_loss": config.train.chain_loss,
        "answers": answers,
        "dtype": dtype,
    }
    evaluation = evaluate(model, task, config.evaluate, **scored)
    result = {
        "status": "finished",
        "step": at.step,
        "tokens": at.tokens,
        "examples": at.examples,
        "generated_tokens": at.generated,
        "seconds": at.seconds,
        "tokens_per_second": at.tokens / at.seconds,
        "peak_bytes": peak,
        "parameters": config.model.num_params(context),
        "trained_parameters": num_weights(grouped(model, config.train))["trained"],
        "flops_per_token": config.model.flops_per_token(context, context.max_length),
        "state_bytes": config.model.state_bytes(context, context.max_length, torch.float32),
        "precision": precision.name,
        "threads": torch.get_num_threads(),
        "device": precision.device,
        "train_loss": at.train_loss,
        "validation": at.validation,
        **({"stage": at.stage} if config.train.curriculum.lengths else {}),
        "evaluation": evaluation,
    }
    samples = [{"verdict": name, **sample} for name in ("right", "wrong") for sample in evaluation["samples"][name]]
    record_training(run.model, training_record(to_dict(config), result))
    run.write_result(result, samples, answers or None)
    return json.loads(json.dumps(result))
