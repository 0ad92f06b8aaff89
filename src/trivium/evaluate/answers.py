"""Score a model by the answers that it generates: every rate with its interval, sliced by the problems' tags."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.config import UserError
from trivium.evaluate.asked import Answers, Asked, GivenAsked, LabelAnswers, SplitAsked, TokenAnswers, Tokens
from trivium.evaluate.chain import chain_scores
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.lengths import scores_by_length, scores_by_pair
from trivium.evaluate.published import scores_of_published
from trivium.evaluate.statistics import errors_of, rate
from trivium.evaluate.teacher import score_batches, teacher_forced
from trivium.generate.calculator import generate_with_calculator
from trivium.generate.engine import Generator, check_length, longest_input
from trivium.generate.labels import read_labels
from trivium.generate.sampling import computing_in, device_of
from trivium.mixers.cache import autocast_dtype
from trivium.model.base import LanguageModel
from trivium.tasks.base import Example, Split, Task, Verdict
from trivium.tasks.jsonl import SHAPE, ended, numbered_rows

TEXTS = 2**14  # answers that are written out at a time, where not all are


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
        asked = SplitAsked(task, split, indices, stage)
        head = {"split": split, "examples": len(asked), "asked": config.examples}
        scores = _scores(model, asked, config, head, temperature, seed, chain_loss, answers)
        if calculator:
            examples = asked.examples(np.arange(len(asked)))
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
    dtype: torch.dtype = torch.float32,
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
    head = {"split": str(path), "examples": len(examples), "asked": len(examples)}
    with computing_in(device_of(model), dtype):
        return _scores(model, GivenAsked(task, examples), config, head, temperature, seed, chain_loss)


def _scores(
    model: LanguageModel,
    asked: Asked,
    config: EvaluateConfig,
    head: dict[str, Any],
    temperature: float,
    seed: int,
    chain_loss: bool,
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    task, count = asked.task, len(asked)
    tokens = Tokens(task.alphabet.end_id)
    batches = (asked.batch(start, min(start + config.batch, count)) for start in range(0, count, config.batch))
    seen = (model.decoding.view(batch, task.alphabet.pad_id) for batch in tokens.watch(batches))
    forced = score_batches(model, seen, chain_loss=chain_loss)
    answers = _answer(model, asked, tokens, config, temperature, seed)
    tags = asked.tags()
    if tags is None or rows is not None or tokens.chained or _is_read(task):
        every = np.arange(count)
        examples, texts = asked.examples(every), answers.texts(every)
        verdicts = [task.verify(example, text) for example, text in zip(examples, texts, strict=True)]
        correct_B = np.array([verdict.correct for verdict in verdicts])
        read = {
            **_rates(task, examples, texts, verdicts),
            "constant": _constant(task, examples),
            "chain": chain_scores(model, task, examples, texts, batch=config.batch),
        }
        if rows is not None:
            rows += _rows(task, examples, texts, verdicts)
        by_tag = _by_tag(examples, correct_B.tolist())
    else:
        correct_B = _right(asked, answers)
        right = rate(int(correct_B.sum()), count)
        read = {"exact_match": right, "readings": {}, "constant": None, "chain": None}
        by_tag = {tag: _slices(values_B, correct_B) for tag, values_B in tags.items()}
    num_right = int(correct_B.sum())
    return {
        "task": task.config.kind,
        "task_version": task.version,
        **head,
        "precision": _precision(model),
        "temperature": temperature,
        **read,
        "errors": errors_of(count - num_right, count),
        "token_accuracy": forced["token_accuracy"],
        "loss": forced["loss"],
        "answer_loss": forced["answer_loss"],
        "generated_tokens_per_problem": answers.generated / count,
        "by_tag": by_tag,
        "by_length": {},
        "by_pair": {},
        "published": {},
        "samples": _samples(asked, answers, correct_B, config.samples),
    }


def _is_read(task: Task) -> bool:
    """Say whether the task may have more to say of an answer than whether it is right."""
    return getattr(task.readings, "__func__", None) is not Task.readings or _constant(task, []) is not None


def _right(asked: Asked, answers: Answers) -> np.ndarray:
    """Return which answers (B,) are right. One of the wanted tokens is; the texts of the others are judged."""
    correct_B = answers.as_wanted_B.copy()
    others = np.flatnonzero(~correct_B)
    for start in range(0, len(others), TEXTS):
        rows = others[start : start + TEXTS]
        pairs = zip(asked.examples(rows), answers.texts(rows), strict=True)
        correct_B[rows] = [asked.task.verify(example, text).correct for example, text in pairs]
    return correct_B


def _precision(model: LanguageModel) -> str:
    """Return the name of the dtype that products are made in."""
    return str(autocast_dtype(device_of(model)) or torch.float32).removeprefix("torch.")


def _rates(
    task: Task, examples: Sequence[Example], texts: Sequence[str], verdicts: Sequence[Verdict] | None = None
) -> dict[str, Any]:
    """Return {"exact_match": rate, "readings": {name: rate and "unread"}} of answers."""
    verdicts = verdicts or [task.verify(example, text) for example, text in zip(examples, texts, strict=True)]
    read: dict[str, list[Verdict]] = defaultdict(list)
    for example, text in zip(examples, texts, strict=True):
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
    model: LanguageModel, asked: Asked, tokens: Tokens, config: EvaluateConfig, temperature: float, seed: int
) -> Answers:
    """Return the model's answer to each problem, end symbol included if it came."""
    task = asked.task
    alphabet = task.alphabet
    if task.labels:
        examples = asked.examples(np.arange(len(asked)))
        prompts = [alphabet.encode(example.prompt) for example in examples]
        texts = []
        for example, read in zip(
            examples, read_labels(model, prompts, batch=config.batch, temperature=temperature), strict=True
        ):
            scored = [weight > 0 for weight in task.encode(example)[2]]
            texts.append(alphabet.decode(list(compress(read.tokens, scored))) + alphabet.end)
        return LabelAnswers(texts)
    prompts_BP, lengths_B = tokens.prompts()
    wanted_BA, counts_B = tokens.wanted()
    generator = Generator(
        model,
        end_id=alphabet.end_id,
        max_new_tokens=max(task.max_length, int(counts_B.max())),
        temperature=temperature,
        seed=seed,
        batch=config.batch,
    )
    found_BN, found_B, _, _ = generator.arrays(torch.from_numpy(prompts_BP), lengths_B)
    return TokenAnswers(alphabet, found_BN, found_B, wanted_BA, counts_B)


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


def _slices(values_B: np.ndarray, correct_B: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the rate of right answers at each value of a tag."""
    kinds, kind_B = np.unique(values_B, return_inverse=True)
    totals, rights = np.bincount(kind_B), np.bincount(kind_B, weights=correct_B)
    slices = {str(kind): rate(int(r), int(n)) for kind, r, n in zip(kinds.tolist(), rights, totals, strict=True)}
    return {value: slices[value] for value in sorted(slices, key=_numbers_first)}


def _samples(asked: Asked, answers: Answers, correct_B: np.ndarray, count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the first `count` right and the first `count` wrong answers."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for name, chosen_B in (("right", correct_B), ("wrong", ~correct_B)):
        rows = np.flatnonzero(chosen_B)[:count]
        judged = [
            (example, text, asked.task.verify(example, text))
            for example, text in zip(asked.examples(rows), answers.texts(rows), strict=True)
        ]
        kept[name] = [
            {
                "prompt": example.prompt,
                "generated": text,
                "wanted": example.answer,
                "correct": verdict.correct,
                "reason": verdict.reason,
                "tags": dict(example.tags),
            }
            for example, text, verdict in judged
        ]
    return kept
