"""Scores on test sets that others published, which do not come from a task's own splits."""

from collections.abc import Sequence
from typing import Any

from trivium.config import UserError
from trivium.evaluate.statistics import rate
from trivium.generate.engine import generate
from trivium.model.base import LanguageModel
from trivium.tasks.base import Example, Task


def published_examples(task: Task, name: str) -> Sequence[Example]:
    """Return the problems of the published test set `name`; raise UserError that says which the task has."""
    try:
        return task.published(name)
    except UserError as error:
        raise UserError(f"evaluate.published: {error}") from None


def check_published(task: Task, names: Sequence[str], room: int) -> None:
    """Raise UserError unless the task has each of these test sets and `room` tokens suffice for it."""
    for name in names:
        for example in published_examples(task, name):
            count = len(task.alphabet.encode(example.prompt + example.answer)) - 1
            if count > room:
                raise UserError(f"evaluate.published: {name}: {count} tokens, the model reads at most {room}")


def scores_of_published(model: LanguageModel, task: Task, names: Sequence[str], *, batch: int) -> dict[str, Any]:
    """Generate an answer to each problem of each test set in `names`, `batch` side by side.

    Returns name -> {"exact_match": rate with Wilson's interval, "wrong": the first few that are wrong}.
    """
    scores = {}
    alphabet = task.alphabet
    for name in names:
        examples = published_examples(task, name)
        generations = generate(
            model,
            [alphabet.encode(example.prompt) for example in examples],
            end_id=alphabet.end_id,
            max_new_tokens=max(len(alphabet.encode(example.answer)) for example in examples),
            batch=batch,
        )
        texts = [alphabet.decode(generation.tokens) for generation in generations]
        wrong = [
            {"prompt": example.prompt, "generated": text, "wanted": example.answer}
            for example, text in zip(examples, texts, strict=True)
            if not task.verify(example, text).correct
        ]
        scores[name] = {"exact_match": rate(len(examples) - len(wrong), len(examples)), "wrong": wrong[:20]}
    return scores
