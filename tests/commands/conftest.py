"""A recipe of three steps, and its finished run."""

from pathlib import Path

import pytest

from tests.commands.line import RECIPE
from trivium import cli


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def trained(recipe) -> Path:
    """A finished run of three steps."""
    runs = recipe.parent / "runs"
    assert cli.main(["train", str(recipe), "--runs", str(runs)]) == 0
    (folder,) = runs.glob("tiny-*/own-s0-*")
    return folder
