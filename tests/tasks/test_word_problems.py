"""Word problems of files in GSM8K's format: splits, vocabularies, verdicts, and files that are not of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tasks.vocabularies import write_pair
from trivium.config import UserError, from_dict
from trivium.tasks.base import ANSWER, CHAIN, Task, TaskConfig
from trivium.tasks.word_answers import number_of

ROWS = [
    {
        "question": f"Ada has {n} shells and finds {n + 1}. How many?",
        "answer": f"{n}+{n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1}\n#### {2 * n + 1}",
    }
    for n in range(2, 32)
]


def write(folder: Path, rows: list[Any], name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def task(folder: Path, rows: Any = ROWS, **options: Any) -> Any:
    given = {"kind": "word_problems", "train": write(folder, rows), "held_out": 5} | options
    return from_dict(TaskConfig, given, "task").build()


def test_the_end_of_the_training_file_is_held_out(tmp_path: Path):
    made = task(tmp_path, test=write(tmp_path, [{"question": "1+1?", "answer": "#### 2"}], "test.jsonl"))
    assert [made.size(split) for split in ("train", "validation", "test")] == [25, 5, 1]
    assert made.example("validation", 0).prompt == ROWS[25]["question"] + "\n"
    assert made.example("train", 24).tags == {"steps": 1}
    with pytest.raises(UserError, match=r"the task has no test problems; give their file as task.test"):
        task(tmp_path).example("test", 0)


@pytest.mark.parametrize("rows", [0, 1, 25])
@pytest.mark.parametrize("pairs", [False, True], ids=["characters", "byte pairs"])
def test_problems_that_are_read_at_once_are_what_each_is_alone(tmp_path: Path, rows: int, pairs: bool):
    made = task(tmp_path, **({"tokenizer": str(write_pair(tmp_path / "bpe", size=300))} if pairs else {}))
    examples = made.problems("train")[:rows]
    together, apart = made.collate(examples), Task.collate(made, examples)
    for name in ("tokens_BT", "targets_BT", "weights_BT", "regions_BT", "lengths_B", "prompt_lengths_B"):
        mine, wanted = getattr(together, name), getattr(apart, name)
        assert mine.dtype == wanted.dtype, name
        np.testing.assert_array_equal(mine, wanted, name)


def test_training_problems_that_are_too_long_are_left_out(tmp_path: Path):
    long = {"question": "x " * 200, "answer": "#### 1"}
    made = task(tmp_path, [long, *ROWS[:10], long, *ROWS[10:]], longest=150)
    assert made.size("train") == 25
    assert made.size("validation") == 5
    with pytest.raises(UserError, match="longest: no training problem has 3 tokens or fewer"):
        task(tmp_path, longest=3)


def test_a_byte_pair_vocabulary_tells_the_number_from_the_solution(tmp_path: Path):
    write_pair(tmp_path / "bpe", size=300)
    made = task(tmp_path, tokenizer=str(tmp_path / "bpe"))
    example = made.example("train", 0)
    assert example.answer.endswith("<|endoftext|>")
    ids = made.alphabet.encode(example.prompt) + made.alphabet.encode(example.answer)
    regions = made.regions(example)
    assert len(regions) == len(ids)
    answer = made.alphabet.decode([i for i, region in zip(ids, regions, strict=True) if region == ANSWER])
    assert answer.strip() == "5<|endoftext|>"
    assert CHAIN in regions
    assert made.verify(example, example.answer).correct


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("a\n#### 1,234", "1234"),
        ("#### $18.", "18"),
        ("#### -3", "-3"),
        ("#### 0.5", "0.5"),
        ("#### 1\n#### 2", "2"),
        ("72", None),
        ("#### none", None),
    ],
)
def test_the_number_is_read_as_gsm8k_reads_it(text: str, number: str | None):
    assert number_of(text) == number


def test_a_task_with_vocabulary_and_length_needs_no_file(tmp_path: Path):
    made = task(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    assert made.config.build().alphabet == made.alphabet


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"train.jsonl:2: not JSON"),
        ("3", r"train.jsonl:2: not an object"),
        ({"question": "a"}, r"train.jsonl:2: answer is missing"),
        ({"question": 3, "answer": "#### 1"}, r"train.jsonl:2: question is not text"),
        ({"question": "a", "answer": "1"}, r"train.jsonl:2: the answer has no #### line"),
        ({"question": "a", "answer": "#### 1\nso"}, r"train.jsonl:2: the answer has no #### line"),
        ({"question": "a <end>", "answer": "#### 1"}, r"train.jsonl:2: holds <end>"),
    ],
)
def test_a_row_that_is_no_problem_is_refused_with_its_line(row: Any, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        task(tmp_path, [ROWS[0], row, *ROWS[1:]])


def test_files_and_values_that_cannot_be_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"missing.jsonl: no such file"):
        task(tmp_path, test=str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match=r"held_out: 30 are asked for, .* has 30 problems"):
        task(tmp_path, held_out=30)
    for options, message in (
        ({"held_out": 0}, "held_out: expected 1"),
        ({"longest": 1}, "longest: expected 2 or more"),
    ):
        with pytest.raises(UserError, match=message):
            task(tmp_path, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no problems"):
        task(tmp_path / "empty", [])
