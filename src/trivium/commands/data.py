"""trivium data show and trivium data write: what a recipe's model is given to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivium.commands.recipes import read_recipe
from trivium.data.jsonl import write_jsonl
from trivium.data.show import ShownExample, ShownToken, show_examples, show_expression
from trivium.model.context import model_context
from trivium.model.positions import RUNS
from trivium.tasks.base import SPLITS


@dataclass(frozen=True)
class ShowOptions:
    recipe: tyro.conf.Positional[Path]
    """Recipe, a YAML file; every value in it can be given as a flag too."""
    expression: str | None = None
    """Problem to show, such as 99+21, in place of drawn ones."""
    count: int = 3
    """Problems to show."""
    split: Literal["train", "validation", "test"] = "train"
    """Split that they come from."""


def show(arguments: Sequence[str]) -> None:
    """Print problems with their tokens, position ids, and which tokens the loss counts."""
    options, recipe = read_recipe(
        ShowOptions, arguments, "trivium data show", "Print examples with tokens, position ids and what is scored."
    )
    task = recipe.task.build()
    model_context(task, recipe.model, recipe.evaluate.lengths)  # refuses a position scheme that the task has no ids for
    numbered = "closing" if getattr(recipe.model, "closing", False) else "block"
    positions = numbered if getattr(recipe.model, "positions", None) in RUNS else "token"
    chain_loss = recipe.train.chain_loss
    if options.expression is not None:
        shown = [show_expression(task, options.expression, positions=positions, chain_loss=chain_loss)]
    else:
        shown = show_examples(task, options.split, options.count, positions=positions, chain_loss=chain_loss)
    console = Console()
    for example in shown:
        draw(console, example)


def draw(console: Console, shown: ShownExample) -> None:
    """Print one problem: its text and a table with a column for each token."""
    console.print(Text(shown.text), soft_wrap=True)
    for part in _parts(shown.tokens, console.width - len("position id") - 3):
        table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_row("token", *(Text(_word(token)) for token in part))
        table.add_row("id", *(str(token.id) for token in part))
        table.add_row("position id", *(str(token.position) for token in part))
        if any(token.target is not None for token in part):
            table.add_row("target", *(Text(token.target or "·") for token in part))
        table.add_row("scored", *("yes" if token.scored else "·" for token in part))
        console.print(table)
    if tags := dict(shown.example.tags):
        console.print(Text("tags: " + ", ".join(f"{name} {value}" for name, value in tags.items())))
    console.print()


def _word(token: ShownToken) -> str:
    return "space" if token.text == " " else token.text


def _parts(tokens: Sequence[ShownToken], room: int) -> list[list[ShownToken]]:
    """Split tokens over tables that fit into `room` columns of text; a table that is too wide loses its cells."""
    parts: list[list[ShownToken]] = [[]]
    left = room
    for token in tokens:
        cells = (_word(token), str(token.id), str(token.position), token.target or "", "yes")
        width = 3 + max(map(len, cells))
        if width > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(token)
        left -= width
    return parts


@dataclass(frozen=True)
class WriteOptions:
    recipe: tyro.conf.Positional[Path]
    """Recipe, a YAML file; every value in it can be given as a flag too."""
    count: int
    """Problems to write for each split; a small split may hold fewer."""
    out: Path
    """Folder for train.jsonl, validation.jsonl and test.jsonl."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Split to write."""


def write(arguments: Sequence[str]) -> None:
    """Write problems to JSONL files and say how many."""
    options, recipe = read_recipe(
        WriteOptions, arguments, "trivium data write", "Write a recipe's problems to JSONL files."
    )
    task = recipe.task.build()
    for split in SPLITS:
        if options.split in ("all", split):
            path = options.out / f"{split}.jsonl"
            number = write_jsonl(task, split, options.count, path)
            fewer = f" (the split has no more than {number} distinct ones)" if number < options.count else ""
            print(f"{path}: {number:,} problems{fewer}")
