"""A recipe and the flags that override it, as the commands that take one read them."""

from collections.abc import Sequence
from typing import TypeVar

from trivium.commands.flags import find_recipe, parse_with_recipe, take_kinds, wants_help
from trivium.registry import UserError
from trivium.study.recipe import Recipe, load_recipe

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
    except UserError:
        # An override may mend the file: its flags are then read with the defaults, and checked with the file below.
        if len(arguments) == 1 or not path.is_file():
            raise
        base = Recipe()
    given, overrides = parse_with_recipe(options, base, rest, prog, description)
    return given, load_recipe(path, {**kinds, **overrides})
