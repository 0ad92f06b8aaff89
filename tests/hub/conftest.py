from pathlib import Path

import pytest

from tests.hub.models import BLOCK, make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(BLOCK, tmp_path / "model")
    return tmp_path / "model"
