"""trivium export: a run's model as a folder of its own."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from trivium.commands.console import announce
from trivium.commands.flags import parse
from trivium.model.folder import save_model
from trivium.train.run import load


@dataclass(frozen=True)
class ExportOptions:
    run: tyro.conf.Positional[Path]
    """Run folder."""
    folder: tyro.conf.Positional[Path]
    """Folder to write: safetensors, config.json and the tokenizer's files."""


def export(arguments: Sequence[str]) -> None:
    """Write the model folder and say how to load it."""
    options = parse(ExportOptions, arguments, "trivium export", "Copy a run's model as a folder that loads anywhere.")
    announce(logging.WARNING)
    model, _, task = load(options.run)
    save_model(options.folder, model, task.config)
    print(f"{options.folder}: load it with trivium.load({str(options.folder)!r})")
