"""Runs that several tests read are trained once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.tiny import broken_at, rows, weights
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


@pytest.fixture
def continued(
    whole: Callable[[RunConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[RunConfig, int], Path]:
    """A function that breaks a run at a step, continues it, demands the unbroken run's end and gives the folder."""

    def check(config: RunConfig, step: int) -> Path:
        with monkeypatch.context() as patch:
            broken_at(patch, step)
            with pytest.raises(RuntimeError, match="died"):
                train(config, tmp_path / "broken")
        train(config, tmp_path / "broken")
        unbroken = whole(config)
        assert rows(tmp_path / "broken") == rows(unbroken)
        assert weights(tmp_path / "broken") == weights(unbroken)
        return tmp_path / "broken"

    return check
