"""Score a model by the answers that it generates: every rate with its interval, sliced by the problems' tags."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.config import UserError
from trivium.evaluate.chain import chain_scores
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.lengths import scores_by_length, scores_by_pair
from trivium.evaluate.published import scores_of_published
from trivium.evaluate.statistics import errors_of, rate
from trivium.evaluate.teacher import score_batches, teacher_forced
from trivium.generate.calculator import generate_with_calculator
from trivium.generate.engine import check_length, generate, longest_input
from trivium.generate.labels import read_labels
from trivium.generate.sampling import computing_in, device_of
from trivium.mixers.cache import autocast_dtype
from trivium.model.base import LanguageModel
from trivium.tasks.base import Batch, Example, Split, Task, Verdict
from trivium.tasks.jsonl import SHAPE, ended, numbered_rows


def evaluate(
    model: LanguageModel,
    task: Task,
    config: EvaluateConfig,
    *,
    split: Split = "test",
    temperature: float = 0.0,
    seed: int = 0,
    chain_loss: bool = True,
    stage: int = 0,
    answers: list[dict[str, Any]] | None = None,
    calculator: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Generate an answer to each of `config.examples` distinct problems of `split` and check it.

    Returns plain data: {"task", "task_version", "split", "examples", "asked", "precision", "temperature",
    "exact_match", "errors", "token_accuracy", "generated_tokens_per_problem", "by_tag", "by_length", "by_pair",
    "published", "chain", "samples"}. A rate is a dict with Wilson's interval. "examples" is below "asked" when the
    split has fewer distinct problems. "errors" bounds how often the model errs, see `errors_of`. "token_accuracy" is
    teacher-forced; `chain_loss` says whether the chain's tokens count for it. "chain" is None without a chain.
    "by_length", "by_pair" and "published" have the scores that `config` asks for, see `scores_by_length`,
    `scores_by_pair` and `scores_of_published`. The answers of a task that labels what it reads are its labels, all read
    in one pass: no token is generated. Of a task of mere text nothing is, see `text_scores`.

    "loss" (chain and answer) and "answer_loss" are teacher-forced too, see there. "readings" has the rates of the
    task's other rules by name, each with "unread", the answers that the rule found nothing in, and, of one that leaves
    some to another, "judged", how many each decided; "constant" is the rate of one and the same answer, that
    of most training problems. With `calculator`, "calculator_assisted" has the rates of answers whose `<<expression=`
    a calculator completed: another metric, see `generate.calculator`. To `answers` a row of each problem is added:
    {"prompt", "generated", "wanted", "answer", "correct", "readings": {name: right or not}}. Products are made in
    `dtype`, of which "precision" has the name.
    """
    with computing_in(device_of(model), dtype):
        indices = task.distinct(split, config.examples, stage)
        if not task.checks_answers:
            return text_scores(model, task, indices, config, split)
        examples = task.examples(split, indices, stage)
        batches = (
            task.gather(split, indices[start : start + config.batch], stage)
            for start in range(0, len(indices), config.batch)
        )
        head = {"split": split, "examples": len(examples), "asked": config.examples}
        scores = _scores(model, task, examples, batches, config, head, temperature, seed, chain_loss, answers)
        if calculator:
            assisted = generate_with_calculator(
                model, task.alphabet, [example.prompt for example in examples], task.max_length, batch=config.batch
            )
            scores["calculator_assisted"] = _rates(task, examples, assisted)
        scores["by_length"] = scores_by_length(model, task, config, split=split, chain_loss=chain_loss)
        scores["by_pair"] = scores_by_pair(model, task, config, split=split)
        scores["published"] = scores_of_published(model, task, config.published, batch=config.batch)
        return scores


def text_scores(
    model: LanguageModel, task: Task, indices: np.ndarray, config: EvaluateConfig, split: Split
) -> dict[str, Any]:
    """Return what `evaluate` does for rows of a text: "loss" (nats a token) and "perplexity" over all their tokens.

    A row matches exactly when the most probable token is right at every place. Documents are read as in training, and
    the end symbols behind them count; `evaluate.perplexity` scores whole texts by other forms.
    """
    forced = teacher_forced(model, task, split, indices, batch=config.batch)
    right = round(forced["exact_match"] * len(indices))
    return {
        "task": task.config.kind,
        "task_version": task.version,
        "split": split,
        "examples": len(indices),
        "asked": config.examples,
        "precision": _precision(model),
        "temperature": 0.0,
        "exact_match": rate(right, len(indices)),
        "errors": errors_of(len(indices) - right, len(indices)),
        "token_accuracy": forced["token_accuracy"],
        "loss": forced["loss"],
        "perplexity": math.exp(min(forced["loss"], 700.0)),
        "generated_tokens_per_problem": 0.0,
        "by_tag": {},
        "by_length": {},
        "by_pair": {},
        "published": {},
        "chain": None,
        "samples": {"right": [], "wrong": []},
    }


def evaluate_file(
    model: LanguageModel,
    task: Task,
    path: Path | str,
    config: EvaluateConfig,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chain_loss: bool = True,
) -> dict[str, Any]:
    """Score every problem of a JSONL file of {"prompt", "answer", "tags"?} rows, as `evaluate` does.

    Raises UserError with file and line for a row that is not of that shape, holds characters that the task does
    not know, or is longer than the model reads.
    """
    examples = []
    room = longest_input(model)
    for number, example in numbered_rows(Path(path)):
        example = ended(example, task.alphabet.end, f"{path}:{number}")
        try:
            lengths = [len(task.alphabet.encode(text)) for text in (example.prompt, example.answer)]
            answer = 0 if task.labels else lengths[1]
            check_length(lengths[0], room, answer, least=model.decoding.shift + 1)
            task.encode(example)  # refuses labels that are not one for each place
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: holds no problems; {SHAPE}")
    batches = (task.collate(examples[start : start + config.batch]) for start in range(0, len(examples), config.batch))
    head = {"split": str(path), "examples": len(examples), "asked": len(examples)}
    return _scores(model, task, examples, batches, config, head, temperature, seed, chain_loss)


def _scores(
    model: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    batches: Iterable[Batch],
    config: EvaluateConfig,
    head: dict[str, Any],
    temperature: float,
    seed: int,
    chain_loss: bool,
    answers: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    seen = (model.decoding.view(batch, task.alphabet.pad_id) for batch in batches)
    forced = score_batches(model, seen, chain_loss=chain_loss)
    texts, generated = _answer(model, task, examples, config, temperature, seed)
    verdicts = [task.verify(example, text) for example, text in zip(examples, texts, strict=True)]
    correct = [verdict.correct for verdict in verdicts]
    if answers is not None:
        answers += _rows(task, examples, texts, verdicts)
    return {
        "task": task.config.kind,
        "task_version": task.version,
        **head,
        "precision": _precision(model),
        "temperature": temperature,
        **_rates(task, examples, texts, verdicts),
        "constant": _constant(task, examples),
        "errors": errors_of(len(correct) - sum(correct), len(correct)),
        "token_accuracy": forced["token_accuracy"],
        "loss": forced["loss"],
        "answer_loss": forced["answer_loss"],
        "generated_tokens_per_problem": generated / len(examples),
        "by_tag": _by_tag(examples, correct),
        "by_length": {},
        "by_pair": {},
        "published": {},
        "chain": chain_scores(model, task, examples, texts, batch=config.batch),
        "samples": _samples(examples, texts, verdicts, config.samples),
    }


def _precision(model: LanguageModel) -> str:
    """Return the name of the dtype that products are made in."""
    return str(autocast_dtype(device_of(model)) or torch.float32).removeprefix("torch.")


def _rates(
    task: Task, examples: Sequence[Example], texts: Sequence[str], verdicts: Sequence[Verdict] | None = None
) -> dict[str, Any]:
    """Return {"exact_match": rate, "readings": {name: rate and "unread"}} of answers."""
    pairs = list(zip(examples, texts, strict=True))
    verdicts = verdicts or [task.verify(example, text) for example, text in pairs]
    read: dict[str, list[Verdict]] = defaultdict(list)
    for example, text in pairs:
        for name, verdict in task.readings(example, text).items():
            read[name].append(verdict)
    return {
        "exact_match": rate(sum(verdict.correct for verdict in verdicts), len(verdicts)),
        "readings": {
            name: {
                **rate(sum(verdict.correct for verdict in found), len(found)),
                "unread": sum(verdict.answer is None for verdict in found),
                **_judges(found),
            }
            for name, found in read.items()
        },
    }


def _judges(found: Sequence[Verdict]) -> dict[str, Any]:
    """Return {"judged": {name: how many answers it decided}} of a rule that does not decide all by itself."""
    judges = Counter(verdict.judge for verdict in found if verdict.judge is not None)
    return {"judged": dict(judges)} if judges else {}


def _constant(task: Task, examples: Sequence[Example]) -> dict[str, Any] | None:
    """Return the rate of the answer that most training problems have; None where the task knows none."""
    try:
        text = task.constant_answer()
    except UserError:  # the training problems are elsewhere
        return None
    if text is None:
        return None
    right = sum(task.verify(example, text).correct for example in examples)
    return {"answer": text, **rate(right, len(examples))}


def _rows(
    task: Task, examples: Sequence[Example], texts: Sequence[str], verdicts: Sequence[Verdict]
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": example.prompt,
            "generated": text,
            "wanted": example.answer,
            "answer": verdict.answer,
            "correct": verdict.correct,
            "readings": {name: found.correct for name, found in task.readings(example, text).items()},
        }
        for example, text, verdict in zip(examples, texts, verdicts, strict=True)
    ]


def _answer(
    model: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    config: EvaluateConfig,
    temperature: float,
    seed: int,
) -> tuple[list[str], int]:
    """Return the model's answer to each example, end symbol included if it came, and how many tokens it generated."""
    alphabet = task.alphabet
    prompts = [alphabet.encode(example.prompt) for example in examples]
    if task.labels:
        texts = []
        for example, read in zip(
            examples, read_labels(model, prompts, batch=config.batch, temperature=temperature), strict=True
        ):
            scored = [weight > 0 for weight in task.encode(example)[2]]
            texts.append(alphabet.decode(list(compress(read.tokens, scored))) + alphabet.end)
        return texts, 0
    generations = generate(
        model,
        prompts,
        end_id=alphabet.end_id,
        max_new_tokens=max(task.max_length, *(len(alphabet.encode(example.answer)) for example in examples)),
        temperature=temperature,
        seed=seed,
        batch=config.batch,
    )
    texts = [alphabet.decode(generation.tokens) for generation in generations]
    return texts, sum(len(generation.tokens) for generation in generations)


def _by_tag(examples: Sequence[Example], correct: Sequence[bool]) -> dict[str, dict[str, Any]]:
    # As text, since JSON knows no other keys: a file's 1 and "1" are one slice.
    slices: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for example, right in zip(examples, correct, strict=True):
        for tag, value in example.tags.items():
            slices[tag][str(value)].append(right)
    return {
        tag: {value: rate(sum(values[value]), len(values[value])) for value in sorted(values, key=_numbers_first)}
        for tag, values in slices.items()
    }


def _numbers_first(value: str) -> tuple[bool, int, str]:
    is_number = re.fullmatch("-?[0-9]{1,4000}", value) is not None
    return (not is_number, int(value) if is_number else 0, value)


def _samples(
    examples: Sequence[Example], texts: Sequence[str], verdicts: Sequence[Verdict], count: int
) -> dict[str, list[dict[str, Any]]]:
    kept: dict[str, list[dict[str, Any]]] = {"right": [], "wrong": []}
    for example, text, verdict in zip(examples, texts, verdicts, strict=True):
        chosen = kept["right" if verdict.correct else "wrong"]
        if len(chosen) < count:
            chosen.append(
                {
                    "prompt": example.prompt,
                    "generated": text,
                    "wanted": example.answer,
                    "correct": verdict.correct,
                    "reason": verdict.reason,
                    "tags": dict(example.tags),
                }
            )
    return kept
