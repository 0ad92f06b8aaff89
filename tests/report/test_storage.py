import errno
import os
from pathlib import Path

import pytest

from trivium.registry import UserError
from trivium.report.storage import naming, reserve, write_whole


def test_a_full_disk_names_the_file_that_was_being_written(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: .*run\.lock") as caught, naming(tmp_path / "run.lock"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC


def test_an_error_that_names_its_file_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "outer"):
        (tmp_path / "inner").read_text()
    assert caught.value.filename == str(tmp_path / "inner")


def test_a_write_that_fails_keeps_the_file_before_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_whole(path, "before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(path, b"after")
    assert caught.value.filename == str(path)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system in which no folder can be made")
def test_a_place_where_no_folder_can_be_made_is_refused_before_anything_is_measured():
    with pytest.raises(UserError, match=r"--out /proc/none/found.json: no folder can be made at /proc/none"):
        reserve(Path("/proc/none/found.json"))
