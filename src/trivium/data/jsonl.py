"""Problems as JSON lines, `{"prompt": ..., "answer": ..., "tags": {...}}`: the shape that the task `jsonl` reads."""

import json
from pathlib import Path

import numpy as np

from trivium.config import UserError
from trivium.report.storage import make_folders, write_whole
from trivium.tasks.base import Split, Task


def write_jsonl(task: Task, split: Split, count: int, path: str | Path, *, overwrite: bool = False) -> int:
    """Write `count` problems of `split` to `path` and return how many there are.

    Validation and test problems are distinct, so that a small split gives fewer; training problems are drawn as
    training draws them. Raises UserError when `path` holds something else and `overwrite` is not set, and OSError when
    it cannot be written.
    """
    if count < 1:
        raise UserError(f"count: expected 1 or more, got {count}")
    path = Path(path)
    size = task.size(split)
    if split == "train":
        indices = np.arange(count if size is None else min(count, size))
    else:
        indices = task.distinct(split, count)
    lines = []
    for example in task.examples(split, indices):
        row = {"prompt": example.prompt, "answer": example.answer, "tags": dict(example.tags)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    content = "".join(lines).encode()
    if path.exists() and not overwrite and path.read_bytes() != content:
        raise UserError(f"{path}: exists and holds something else; remove it or choose another folder")
    make_folders(path.parent)
    write_whole(path, content)
    return len(lines)
