"""trivium export: a run's model, or that of another trainer's checkpoint, as a folder of its own."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from trivium.commands.console import announce
from trivium.commands.flags import parse
from trivium.commands.train import pick
from trivium.config import UserError
from trivium.model.folder import save_model
from trivium.study.recipe import load_recipe
from trivium.train.dcp import model_of_dcp
from trivium.train.run import load, training_of


@dataclass(frozen=True)
class ExportOptions:
    run: tyro.conf.Positional[Path]
    """Run or model folder; with --from-dcp, a folder of torch's distributed checkpoint that another trainer wrote."""
    folder: tyro.conf.Positional[Path]
    """Folder to write: safetensors, config.json, the tokenizer's files and a model card."""
    from_dcp: bool = False
    """Read a distributed checkpoint; its list of tensors is a pickle, so it needs --trust-pickle, and --recipe."""
    recipe: Path | None = None
    """Recipe, or a run's config.yaml, that describes the checkpoint's task and model."""
    variant: str | None = None
    """Variant of the recipe's study that the checkpoint is of."""
    prefix: str | None = None
    """What stands before the model's names in the checkpoint, such as model. (default: it is found)."""
    trust_pickle: bool = False
    """Read the checkpoint's pickle, which can run any code: only where you trust who wrote it."""


def export(arguments: Sequence[str]) -> None:
    """Write the model folder and say how to load it."""
    options = parse(ExportOptions, arguments, "trivium export", "Copy a model as a folder that loads anywhere.")
    announce(logging.WARNING)
    if options.from_dcp:
        if options.recipe is None:
            raise UserError("--recipe: missing; a distributed checkpoint does not say which model it is of")
        _, config = pick(load_recipe(options.recipe), options.variant)
        model, task = model_of_dcp(options.run, config, trust_pickle=options.trust_pickle, prefix=options.prefix)
        save_model(options.folder, model, task.config)
    else:
        for name in ("recipe", "variant", "prefix", "trust_pickle"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')}: belongs to --from-dcp, which is not given")
        model, _, task = load(options.run)
        save_model(options.folder, model, task.config, training_of(options.run))
    print(f"{options.folder}: load it with trivium.load({str(options.folder)!r})")
