"""Writing problems to files, and never over something else."""

import json

import pytest

from trivium.config import UserError
from trivium.data.jsonl import write_jsonl
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.jsonl import JsonlConfig, read_rows

TASK = AdditionConfig(format="column", max_digits=2).build()


def test_written_problems_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "test.jsonl"
    assert write_jsonl(TASK, "test", 20, path) == 20
    rows = read_rows(path)
    assert rows == TASK.examples("test", TASK.distinct("test", 20))
    assert len({row.prompt for row in rows}) == 20
    assert list(tmp_path.rglob("*.part")) == []
    first = json.loads(path.read_text().splitlines()[0])
    assert set(first) == {"prompt", "answer", "tags"}


def test_files_of_all_splits_make_a_task_to_train_on(tmp_path):
    paths = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    for split, path in paths.items():
        write_jsonl(AdditionConfig(format="plain", max_digits=3).build(), split, 30, path)
    task = JsonlConfig(**paths).build()
    assert [task.size(split) for split in paths] == [30, 30, 30]
    example = task.example("test", 0)
    assert task.verify(example, example.answer).correct


def test_a_small_split_gives_fewer(tmp_path):
    task = AdditionConfig(max_digits=1, train_examples=5).build()
    assert 0 < write_jsonl(task, "test", 1000, tmp_path / "test.jsonl") < 55
    assert write_jsonl(task, "train", 1000, tmp_path / "train.jsonl") == 5


def test_a_file_of_other_content_is_left_alone_unless_told(tmp_path):
    path = tmp_path / "train.jsonl"
    write_jsonl(TASK, "train", 3, path)
    before = path.read_bytes()
    write_jsonl(TASK, "train", 3, path)  # the same content: nothing to lose
    with pytest.raises(UserError, match="holds something else"):
        write_jsonl(TASK, "train", 4, path)
    assert path.read_bytes() == before
    assert write_jsonl(TASK, "train", 4, path, overwrite=True) == 4
    assert len(read_rows(path)) == 4


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_jsonl(TASK, "train", 1, tmp_path / "file" / "train.jsonl")
    with pytest.raises(UserError, match="count"):
        write_jsonl(TASK, "train", 0, tmp_path / "none.jsonl")
