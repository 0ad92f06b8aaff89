"""Scores at one length at a time, also beyond those of training.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from trivium.config import UserError
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.statistics import rate
from trivium.generate.engine import evaluating, generate, longest_input
from trivium.generate.sampling import device_of
from trivium.model.base import Decoding, LanguageModel
from trivium.tasks.base import ANSWER, CHAIN, Batch, Example, Split, Task


def scores_by_length(
    model: LanguageModel,
    task: Task,
    config: EvaluateConfig,
    *,
    split: Split = "test",
    chain_loss: bool = True,
) -> dict[str, dict[str, Any]]:
    """Return the scores at each of `config.lengths`, on up to `config.examples` distinct problems of each.

    Length as text -> {"examples", "exact_match": rate of the problems whose whole answer is right, "token_error": rate
    of wrong tokens of the answers, given the right ones before, "by_position"}. Rates have Wilson's interval; tokens of
    one problem err together, so that the error's is narrower than it ought to be. A task that labels what it reads has
    "by_position": {"wrong": [...], "n": [...]}, counts at each place of the input; it is None for the others, whose
    exact match is that of generated answers. Raises UserError for lengths that the task or the model has no place for.
    """
    scores: dict[str, dict[str, Any]] = {}
    room = longest_input(model)
    for length in config.lengths:
        try:
            sized = task.at_length(length)
            model.decoding.check(sized)
        except UserError as error:
            raise UserError(f"evaluate.lengths: {length}: {error}") from None
        if sized.max_length - 1 > room:
            raise UserError(
                f"evaluate.lengths: {length}: problems of {sized.max_length - 1} tokens, the model reads at most {room}"
            )
        indices = sized.distinct(split, config.examples)
        wrong_T, count_T = np.zeros((2, sized.max_length), dtype=np.int64)
        exact = 0
        for start in range(0, len(indices), config.batch):
            rows = indices[start : start + config.batch]
            batch = model.decoding.view(sized.gather(split, rows), sized.alphabet.pad_id)
            wrong_BT, scored_BT = _errors(model, batch, chain_loss)
            width = wrong_BT.shape[1]
            wrong_T[:width] += wrong_BT.sum(axis=0)
            count_T[:width] += scored_BT.sum(axis=0)
            exact += int((~wrong_BT.any(axis=1)).sum()) if sized.labels else sum(_solved(model, sized, split, rows))
        read = np.flatnonzero(count_T)
        last = int(read[-1]) + 1
        scores[str(length)] = {
            "examples": len(indices),
            "exact_match": rate(exact, len(indices)),
            "token_error": rate(int(wrong_T.sum()), int(count_T.sum())),
            "by_position": {"wrong": wrong_T[:last].tolist(), "n": count_T[:last].tolist()} if sized.labels else None,
        }
    return scores


def _errors(model: LanguageModel, batch: Batch, chain_loss: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (wrong, scored), each bool (B, T), of the targets of the answers."""
    regions = (ANSWER, CHAIN) if chain_loss else (ANSWER,)
    scored_BT = np.isin(batch.regions_BT, regions) & (batch.weights_BT > 0)
    with evaluating(model), torch.inference_mode():
        logits_BTV, _ = model(torch.from_numpy(batch.tokens_BT).to(device_of(model)))
        chosen_BT = logits_BTV.argmax(-1).cpu().numpy()
    return (chosen_BT != batch.targets_BT) & scored_BT, scored_BT


def _solved(model: LanguageModel, task: Task, split: Split, indices: np.ndarray) -> Iterator[bool]:
    """Say of each problem whether the answer that the model generates is right."""
    return _answers_right(model, task, task.examples(split, indices), len(indices))


def sized_by_pair(task: Task, lengths: Sequence[int], decoding: Decoding, room: int) -> Iterator[tuple[str, Task]]:
    """Yield the name `AxB` and the task of each pair of `lengths`, first numbers in the outer loop.

    Raises UserError for lengths that the task, its decoding or a model that reads `room` tokens has no place for.
    """
    for first in lengths:
        for second in lengths:
            try:
                sized = task.at_pair(first, second)
                decoding.check(sized)
            except UserError as error:
                raise UserError(f"evaluate.pairs: {first}x{second}: {error}") from None
            if sized.max_length - 1 > room:
                raise UserError(
                    f"evaluate.pairs: {first}x{second}: problems of {sized.max_length - 1} tokens, the model reads at "
                    f"most {room}"
                )
            yield f"{first}x{second}", sized


def _answers_right(model: LanguageModel, task: Task, examples: Sequence[Example], batch: int) -> Iterator[bool]:
    alphabet = task.alphabet
    generations = generate(
        model,
        [alphabet.encode(example.prompt) for example in examples],
        end_id=alphabet.end_id,
        max_new_tokens=max(len(alphabet.encode(example.answer)) for example in examples),
        batch=batch,
    )
    for example, generation in zip(examples, generations, strict=True):
        yield task.verify(example, alphabet.decode(generation.tokens)).correct


def scores_by_pair(
    model: LanguageModel, task: Task, config: EvaluateConfig, *, split: Split = "test"
) -> dict[str, Any]:
    """Return the rate of generated answers that are right at each pair of `config.pairs`, by its name `AxB`.

    Up to `config.pair_examples` distinct problems each, of a first number of A digits and a second of B. Rates have
    Wilson's interval. Raises UserError for lengths that the task or the model has no place for.
    """
    if not config.pairs:
        return {}
    names: list[str] = []
    examples: list[Example] = []
    for name, sized in sized_by_pair(task, config.pairs, model.decoding, longest_input(model)):
        found = sized.examples(split, sized.distinct(split, config.pair_examples))
        names += [name] * len(found)
        examples += found
    right: dict[str, list[int]] = {name: [0, 0] for name in names}
    for name, solved in zip(names, _answers_right(model, task, examples, config.batch), strict=True):
        right[name][0] += solved
        right[name][1] += 1
    return {name: rate(*counts) for name, counts in right.items()}
