"""A recipe and the flags that override it, as the commands that take one read them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from trivium.commands.flags import find_recipe, parse_with_recipe, take_kinds, wants_help
from trivium.config import load_yaml
from trivium.model.base import MODELS
from trivium.registry import UserError
from trivium.study.recipe import Recipe, load_recipe
from trivium.tasks.base import TASKS

T = TypeVar("T")


def read_recipe(options: type[T], arguments: Sequence[str], prog: str, description: str) -> tuple[T, Recipe]:
    """Return the command's own options and the recipe with its overrides applied.

    Raises UserError for a wrong flag, value or recipe, and SystemExit(0) after --help, which shows the recipe's own
    values as defaults, or those of the program when no recipe is given.
    """
    path = find_recipe(arguments)
    rest, kinds = take_kinds(arguments)
    if path is None:
        if not wants_help(arguments):
            raise UserError(f"give a recipe: {prog} RECIPE [--field value ...]")
        parse_with_recipe(options, Recipe(), rest, prog, description)
    assert path is not None
    try:
        base = load_recipe(path, kinds)
    except UserError as error:
        # An override may mend the file: its flags are then read with the defaults, and checked with the file below.
        if len(arguments) == 1 or not path.is_file():
            raise
        try:
            base = _defaults(path, kinds)
        except UserError:
            raise error from None
    given, overrides = parse_with_recipe(options, base, rest, prog, description)
    return given, load_recipe(path, {**kinds, **overrides})


def _defaults(path: Path, kinds: Mapping[str, str]) -> Recipe:
    """Return a recipe of the kinds that the file and the flags name, with the fields' defaults."""
    parts = {}
    for section, registry in (("task", TASKS), ("model", MODELS)):
        written = load_yaml(path).get(section)
        kind = kinds.get(f"{section}.kind") or (written.get("kind") if isinstance(written, Mapping) else None)
        if isinstance(kind, str):
            parts[section] = _blank(registry.get(kind))
    return dataclasses.replace(Recipe(), **parts)


def _blank(cls: type[T]) -> T:
    """Return an unchecked `cls` whose required fields are None: enough to list its flags."""
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        factory = field.default_factory
        default = None if field.default is dataclasses.MISSING else field.default
        object.__setattr__(made, field.name, default if factory is dataclasses.MISSING else factory())
    return made
