"""trivium eval: score a trained run on problems that it never saw, or on a person's own file."""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from trivium.commands.console import announce
from trivium.commands.flags import parse
from trivium.commands.scores import show_harness, show_readings, show_text
from trivium.config import UserError
from trivium.evaluate.answers import evaluate as evaluate_split
from trivium.evaluate.answers import evaluate_file
from trivium.evaluate.compare import compare_with, read_answers
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.harness import run_harness
from trivium.evaluate.perplexity import score_text
from trivium.evaluate.published import check_published
from trivium.evaluate.trace import Trace, save_trace, trace
from trivium.generate.engine import longest_input
from trivium.model.base import LanguageModel
from trivium.report.storage import make_folders, write_whole
from trivium.report.tables import length_tables, to_rich
from trivium.tasks.base import Split, Task
from trivium.train.precision import DTYPES, has_bfloat16
from trivium.train.run import load, scored_in

TRACED = 8  # problems whose traces are stored

_log = logging.getLogger("trivium")


@dataclass(frozen=True)
class EvalOptions:
    run: tyro.conf.Positional[Path]
    """Run folder (one that has not finished gives its newest checkpoint), or one that `trivium export` wrote."""
    data: Path | None = None
    """JSONL file of {"prompt", "answer", "tags"?} rows to score instead of a split of the task."""
    examples: int = 1000
    """Distinct problems to score."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the task that they come from."""
    temperature: float = 0.0
    """Temperature of sampling; 0 takes the most probable token."""
    seed: int = 0
    """Seed of sampling."""
    batch: int = 256
    """Rows generated side by side."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Arithmetic (default: that in which the run scored its own test, see `evaluate.precision`)."""
    lengths: tuple[int, ...] = ()
    """Lengths, also beyond those of training, to score the model at one by one; the model must be able to read them."""
    pairs: tuple[int, ...] = ()
    """Lengths of either of a problem's two numbers, to score the model at each pair of them."""
    published: tuple[str, ...] = ()
    """Published test sets of the task to score as well, such as adderboard."""
    trace: bool = False
    """Store what the model looked at in the first of these problems in the run's folder, as traces/*.safetensors."""
    answers: Path | None = None
    """JSONL file to write with every problem, what was generated, and whether it is right."""
    against: Path | None = None
    """Another run, or a file that --answers wrote, to compare with problem by problem (McNemar's test)."""
    calculator: bool = False
    """Generate a second time with a calculator that completes `<<expression=`; its scores have names of their own."""
    perplexity: Path | None = None
    """Score a text instead: a corpus of `trivium data prepare` (its --split), or files; every token counts."""
    window: int | None = None
    """Tokens that a pass of --perplexity reads (default: what the model reads)."""
    stride: int | None = None
    """Tokens that a pass of --perplexity scores, at the end of its window (default: all, windows side by side)."""
    harness: tuple[str, ...] | None = None
    """Tasks of lm-evaluation-harness to score instead, by name or as paths of their YAML files; needs lm-eval."""
    limit: int | None = None
    """Problems of each task of --harness (default: all)."""
    json: bool = False
    """Print the scores as JSON on standard output."""


def evaluate(arguments: Sequence[str]) -> None:
    """Score and print."""
    options = parse(EvalOptions, arguments, "trivium eval", "Score a trained run.")
    if options.temperature < 0:
        raise UserError(f"--temperature: expected 0 or more, got {options.temperature}")
    config = replace(
        EvaluateConfig(),
        examples=options.examples,
        batch=options.batch,
        lengths=options.lengths,
        pairs=options.pairs,
        published=options.published,
    )
    announce()
    if options.trace and options.data is not None:
        raise UserError("--trace: given beside --data; it stores problems of a split")
    for name in ("lengths", "pairs"):
        if getattr(options, name) and options.data is not None:
            raise UserError(f"--{name}: given beside --data, whose problems have the lengths that they have")
    if options.published and options.data is not None:
        raise UserError("--published: given beside --data; it is scored beside a split of the task")
    refuse_mixed(options)
    model, _, task = load(options.run)
    if options.perplexity is not None:
        found = score_text(model, task, options.perplexity, options.split, options.window, options.stride)
        print(json.dumps(found, indent=1)) if options.json else show_text(found)
        return
    if options.harness:
        with redirect_stdout(sys.stderr):  # what its libraries print is no part of our answer
            results = run_harness(model, task, options.harness, batch=options.batch, limit=options.limit)
        print(json.dumps(results, indent=1)) if options.json else show_harness(results)
        return
    for name in ("answers", "against", "calculator"):
        if getattr(options, name) and not task.checks_answers:
            raise UserError(f"--{name}: {task.config.kind} has no answers, of which it would be")
    if options.calculator and (options.temperature or task.labels):
        raise UserError("--calculator: generates greedily, token by token; it takes no --temperature and no labels")
    # What cannot be compared with is refused before anything is scored.
    theirs = against(options) if options.against is not None else None
    check_published(task, options.published, longest_input(model))
    # What cannot be traced is refused before anything is scored.
    traced = traces(model, task, options.split, options.examples) if options.trace else {}
    answers: list[dict[str, Any]] = []
    dtype = arithmetic(options.run, options.precision)
    with torch.inference_mode():
        if options.data is not None:
            scores = evaluate_file(
                model, task, options.data, config, temperature=options.temperature, seed=options.seed, dtype=dtype
            )
        else:
            scores = scored(model, task, config, options, dtype, answers, calculator=options.calculator)
    if options.answers is not None:
        make_folders(options.answers.parent)
        write_whole(options.answers, "".join(json.dumps(row) + "\n" for row in answers))
    if theirs is not None:
        scores["against"] = compare_with(answers, theirs if isinstance(theirs, list) else answers_of(*theirs, options))
    if options.json:
        print(json.dumps(scores, indent=1))
    else:
        show(scores)
    for name, found in traced.items():
        arrays, _ = save_trace(found, options.run / "traces" / name)
        print(f"traced {''.join(found.tokens[: found.prompt])} in {arrays}", file=sys.stderr)


def against(options: EvalOptions) -> list[dict[str, Any]] | tuple[LanguageModel, Task]:
    """Return the answers of the file that --against names, or the other run's model and task."""
    assert options.against is not None
    if options.against.is_file():
        return read_answers(options.against)
    model, _, task = load(options.against)
    if not task.checks_answers:
        raise UserError(f"--against: {options.against} is of {task.config.kind}, which has no answers")
    return model, task


def answers_of(model: LanguageModel, task: Task, options: EvalOptions) -> list[dict[str, Any]]:
    """Return what the run --against answers to the problems of the same number, split and seed."""
    assert options.against is not None
    answers: list[dict[str, Any]] = []
    config = replace(EvaluateConfig(), examples=options.examples, batch=options.batch)
    dtype = arithmetic(options.against, options.precision)
    with torch.inference_mode():
        scored(model, task, config, options, dtype, answers)
    return answers


def arithmetic(folder: Path, named: str | None) -> torch.dtype:
    """Return the dtype to score the model of `folder` in; say it where it is slow on the processor."""
    dtype = DTYPES[named] if named else scored_in(folder)
    native, reason = has_bfloat16(torch.device("cpu"))
    if dtype == torch.bfloat16 and not native:
        _log.warning("%s: scored in bfloat16, slowly: %s; --precision float32 is faster", folder, reason)
    return dtype


def scored(
    model: LanguageModel,
    task: Task,
    config: EvaluateConfig,
    options: EvalOptions,
    dtype: torch.dtype,
    answers: list[dict[str, Any]],
    calculator: bool = False,
) -> dict[str, Any]:
    """Return the scores on the split that was asked for, and add every answer to `answers`."""
    return evaluate_split(
        model,
        task,
        config,
        split=options.split,
        temperature=options.temperature,
        seed=options.seed,
        answers=answers,
        calculator=calculator,
        dtype=dtype,
    )


def refuse_mixed(options: EvalOptions) -> None:
    """Raise UserError for options that do not go together."""
    if options.harness == ():
        raise UserError("--harness: names no task; give names that lm-eval knows, or paths of YAML files of its format")
    for name in ("data", "perplexity", "harness"):
        for other in ("answers", "against", "calculator"):
            if getattr(options, name) and getattr(options, other):
                raise UserError(f"--{other}: given beside --{name}; it is of problems of a split")
    for name, of in (("window", "perplexity"), ("stride", "perplexity"), ("limit", "harness")):
        if getattr(options, name) is not None and not getattr(options, of):
            raise UserError(f"--{name}: belongs to --{of}, which is not given")
    if options.perplexity is not None and options.harness:
        raise UserError("--harness: given beside --perplexity; give one of them")
    for of, why in (("perplexity", "which scores a text and no problems"), ("harness", "which has its own problems")):
        for name in ("data", "lengths", "pairs", "published", "trace", "temperature", "precision"):
            if getattr(options, of) and getattr(options, name):
                raise UserError(f"--{name}: given beside --{of}, {why}")


def traces(model: LanguageModel, task: Task, split: Split, examples: int) -> dict[str, Trace]:
    """Return the traces of a few problems of `split` by the name under which they are stored."""
    indices = task.distinct(split, min(examples, TRACED))
    problems = zip(indices, task.examples(split, indices), strict=True)
    return {f"{split}-{index}": trace(model, task, example) for index, example in problems}


def show(scores: dict[str, Any]) -> None:
    """Print scores as a table of rates with their 95 % intervals, sliced by tags."""
    table = Table(
        title=f"{scores['task']} v{scores['task_version']}, {scores['examples']} problems ({scores['split']})"
    )
    table.add_column("slice")
    for column in ("exact match", "95 % interval", "right", "of"):
        table.add_column(column, justify="right")
    rows = [("all", scores["exact_match"])]
    rows += [(f"{tag} {value}", rate) for tag, values in scores["by_tag"].items() for value, rate in values.items()]
    for name, rate in rows:
        interval = f"{rate['low']:.1%} – {rate['high']:.1%}"
        table.add_row(name, f"{rate['rate']:.1%}", interval, str(rate["successes"]), str(rate["n"]))
    console = Console()
    console.print(table)
    for by_length in length_tables({scores["task"]: scores.get("by_length") or {}}):
        console.print(to_rich(by_length))
    for name, found in (scores.get("published") or {}).items():
        match = found["exact_match"]
        console.print(f"published test {name}: {match['successes']:,} of {match['n']:,} right")
    for pair, rate in (scores.get("by_pair") or {}).items():
        console.print(f"{pair}: {rate['successes']} of {rate['n']} right")
    errors = scores["errors"]
    if scores.get("precision", "float32") != "float32":
        console.print(f"computed in {scores['precision']}")
    console.print(
        f"errors: {errors['errors']:,} of {errors['n']:,}; with 95 % confidence at most {errors['upper']:.2g}"
    )
    console.print(f"token accuracy, teacher forced: {scores['token_accuracy']:.2%}")
    if "perplexity" in scores:
        console.print(f"perplexity of these rows: {scores['perplexity']:.4g}")
    if scores.get("answer_loss") is not None:
        console.print(f"answer tokens, teacher forced: {scores['answer_loss']:.4g} nats each")
    show_readings(console, scores)
    console.print(f"generated tokens a problem: {scores['generated_tokens_per_problem']:.1f}")
    for name, rate in (scores["chain"] or {}).items():
        if isinstance(rate, dict) and "rate" in rate:
            share = f"{rate['rate']:.1%}" if rate["n"] else "none to judge"
            console.print(f"chain, {name.replace('_', ' ')}: {share} ({rate['successes']} of {rate['n']})")
    for sample in scores["samples"]["wrong"][:3]:
        console.print(f"wrong: {sample['prompt']}{sample['generated']}  wanted {sample['wanted']}", markup=False)
