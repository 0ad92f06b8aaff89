"""Runs that several tests read are trained once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trivium.config import config_hash
from trivium.train.config import RunConfig
from trivium.train.loop import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], Path]:
    """A function that trains a run without a break, and gives its folder again when asked again. Read it only."""
    folders: dict[str, Path] = {}

    def trained(config: RunConfig) -> Path:
        name = config_hash(config)
        if name not in folders:
            folder = tmp_path_factory.mktemp("whole") / "run"
            train(config, folder)
            folders[name] = folder
        return folders[name]

    return trained
