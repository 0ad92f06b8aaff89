"""trivium eval: score a trained run on problems that it never saw, or on a person's own file."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from trivium.commands.console import announce
from trivium.commands.flags import parse
from trivium.config import UserError
from trivium.evaluate.answers import evaluate as evaluate_split
from trivium.evaluate.answers import evaluate_file
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.published import check_published
from trivium.evaluate.trace import Trace, save_trace, trace
from trivium.generate.engine import longest_input
from trivium.model.base import LanguageModel
from trivium.report.tables import length_tables, to_rich
from trivium.tasks.base import Split, Task
from trivium.train.run import load

TRACED = 8  # problems whose traces are stored


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
    lengths: tuple[int, ...] = ()
    """Lengths, also beyond those of training, to score the model at one by one; the model must be able to read them."""
    pairs: tuple[int, ...] = ()
    """Lengths of either of a problem's two numbers, to score the model at each pair of them."""
    published: tuple[str, ...] = ()
    """Published test sets of the task to score as well, such as adderboard."""
    trace: bool = False
    """Store what the model looked at in the first of these problems in the run's folder, as traces/*.safetensors."""
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
    model, _, task = load(options.run)
    check_published(task, options.published, longest_input(model))
    # What cannot be traced is refused before anything is scored.
    traced = traces(model, task, options.split, options.examples) if options.trace else {}
    with torch.inference_mode():
        if options.data is not None:
            scores = evaluate_file(
                model, task, options.data, config, temperature=options.temperature, seed=options.seed
            )
        else:
            scores = evaluate_split(
                model, task, config, split=options.split, temperature=options.temperature, seed=options.seed
            )
    if options.json:
        print(json.dumps(scores, indent=1))
    else:
        show(scores)
    for name, found in traced.items():
        arrays, _ = save_trace(found, options.run / "traces" / name)
        print(f"traced {''.join(found.tokens[: found.prompt])} in {arrays}", file=sys.stderr)


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
    console.print(
        f"errors: {errors['errors']:,} of {errors['n']:,}; with 95 % confidence at most {errors['upper']:.2g}"
    )
    console.print(f"token accuracy, teacher forced: {scores['token_accuracy']:.2%}")
    console.print(f"generated tokens a problem: {scores['generated_tokens_per_problem']:.1f}")
    for name, rate in (scores["chain"] or {}).items():
        if isinstance(rate, dict) and "rate" in rate:
            share = f"{rate['rate']:.1%}" if rate["n"] else "none to judge"
            console.print(f"chain, {name.replace('_', ' ')}: {share} ({rate['successes']} of {rate['n']})")
    for sample in scores["samples"]["wrong"][:3]:
        console.print(f"wrong: {sample['prompt']}{sample['generated']}  wanted {sample['wanted']}", markup=False)
