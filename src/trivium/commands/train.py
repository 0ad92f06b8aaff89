"""trivium train: one run, the recipe's own model or one variant of its study."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from trivium.commands import fail
from trivium.commands.console import announce
from trivium.commands.recipes import read_recipe
from trivium.config import UserError
from trivium.registry import nearest
from trivium.report.run import write_report
from trivium.study.jobs import Event
from trivium.study.live import LiveProgress
from trivium.study.recipe import Recipe
from trivium.study.variants import expand, folder_name, prefixed
from trivium.train.config import RunConfig
from trivium.train.distributed import world_of_environment
from trivium.train.loop import train as train_run
from trivium.train.stop import TrainingStopped


@dataclass(frozen=True)
class TrainOptions:
    recipe: tyro.conf.Positional[Path]
    """Recipe, a YAML file; every value in it can be given as a flag too."""
    variant: str | None = None
    """Variant of the recipe's study to train, sized as `trivium compare` sizes it."""
    runs: Path = Path("runs")
    """Folder that holds the run folders."""


def train(arguments: Sequence[str]) -> int:
    """Train, and say where the run folder is."""
    options, recipe = read_recipe(TrainOptions, arguments, "trivium train", "Train the model of a recipe.")
    name, config = pick(recipe, options.variant)
    study = options.runs / recipe.folder_name
    first = world_of_environment().first
    if first:
        announce()
    try:
        # Of the processes that torchrun starts, one alone draws.
        with LiveProgress(1) if first else nullcontext(lambda event: None) as live:

            def run(config: RunConfig, folder: Path) -> dict[str, Any]:
                return train_run(
                    config,
                    folder,
                    on_progress=lambda now: live(Event("progress", folder.name, dataclasses.asdict(now))),
                )

            pretraining = recipe.pretraining(config)
            if pretraining is not None:
                before = study / folder_name(name, pretraining, pretraining=True)
                with prefixed("pretrain: "):
                    run(pretraining, before)
                config = replace(config, train=replace(config.train, init_from=before))
            folder = study / folder_name(name, config)
            result = run(config, folder)
    except TrainingStopped as stop:
        return fail(str(stop)) if first else 1
    if first:
        exact, perplexity = result["evaluation"]["exact_match"], result["evaluation"].get("perplexity")
        if perplexity is None:
            score = (
                f"{exact['successes']} of {exact['n']} unseen problems right ({exact['rate']:.1%}, 95 % interval "
                f"{exact['low']:.1%} to {exact['high']:.1%})"
            )
        else:
            score = f"perplexity {perplexity:.2f} on {exact['n']} unseen rows of text"
        print(f"{score} after {result['step']} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s")
        print(f"run folder: {folder}")
        print(f"report:     {write_report(folder)}")
        print(f"talk to it: trivium chat {folder}")
    return 0


def pick(recipe: Recipe, variant: str | None) -> tuple[str, RunConfig]:
    """Return the name and the configuration of the run: the recipe's own, or that of `variant`."""
    if variant is None:
        return "own", recipe.run
    known = {each.name: each for each in expand(recipe)}
    if variant not in known:
        raise UserError(f"--variant: unknown variant {variant!r}; {nearest(variant, list(known))}")
    return variant, known[variant].run(recipe.train.seed)
