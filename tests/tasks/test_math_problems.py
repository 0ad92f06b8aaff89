"""Competition problems: boxed answers, when two are equal, files that hold something else. The problems are our own."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.vocabularies import trained
from trivium.config import UserError, from_dict
from trivium.data.tokenizers import BytePairTokenizer
from trivium.evaluate.answers import _rates
from trivium.tasks import math_answers
from trivium.tasks.base import ANSWER, Example, TaskConfig
from trivium.tasks.byte_pairs import BytePairs
from trivium.tasks.math_answers import equal, equal_as_text, last_boxed

ROWS = [
    {"problem": f"Halve {n}.", "solution": f"Half of {n} is \\boxed{{\\frac{{{n}}}{{2}}}}.", "level": n % 3}
    for n in range(3, 30)
]
needs_math_verify = pytest.mark.skipif(not math_answers.has_math_verify(), reason="math-verify is not installed")


def write(folder: Path, rows: list[Any], name: str = "train.jsonl") -> str:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def task(folder: Path, rows: list[Any] = ROWS, **options: Any) -> Any:
    given = {"kind": "math_problems", "train": write(folder, rows), "held_out": 5} | options
    return from_dict(TaskConfig, given, "task").build()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} and then \boxed{\frac{a}{b+{c}}}$", r"\frac{a}{b+{c}}"),
        (r"\fbox{ 7 }", "7"),
        (r"so $\boxed 12$.", "12"),
        (r"a set \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} but \boxed{2", None),
        ("no box", None),
        (r"\boxed", None),
    ],
)
def test_the_last_box_is_the_answer(text: str, answer: str | None):
    assert last_boxed(text) == answer


SAME = [
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"\frac{1}{2}", "0.5"),
    ("1,234", "1234"),
    (r"\$12", "12.0"),
    (r"90^\circ", "90"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"12\text{ cm}", "12"),
    (r"\text{(A)}", "(A)"),
    ("x=4", "4"),
    (r"-\frac{3}{4}", "-3/4"),
    (r"10\%", "10"),
]
DIFFERENT = [
    ("5", "6"),
    (r"\frac{1}{2}", "2"),
    ("(1,2)", "(2,1)"),
    ("", "5"),
    ("x^2", "x^3"),
    ("1/0", "1"),
    pytest.param("1" * 5000, "5", id="more digits than Python reads"),
]


@pytest.mark.parametrize(("given", "wanted"), SAME)
def test_equal_answers_are_equal_as_text(given: str, wanted: str):
    assert equal_as_text(given, wanted)
    assert equal_as_text(wanted, given)
    assert equal(given, wanted)


@pytest.mark.parametrize(("given", "wanted"), DIFFERENT)
def test_other_answers_are_not(given: str, wanted: str):
    assert not equal_as_text(given, wanted)
    assert not equal(given, wanted)


@needs_math_verify
def test_math_verify_sees_what_text_does_not(monkeypatch):
    monkeypatch.setattr(math_answers, "SECONDS", 1)
    for given, wanted in ((r"1+x^2", r"x^2+1"), (r"\frac{2}{\sqrt{2}}", r"\sqrt{2}")):
        assert not equal_as_text(given, wanted)
        assert equal(given, wanted)
    for strange in ("\\{", "}{", "\\frac{", "@" * 50, "9^{9^{9^9}}", "1" * 1000):
        assert not equal(strange, "5"), "an answer that cannot be read is wrong, never a crash"


def test_without_math_verify_text_is_compared_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(math_answers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math_answers.has_math_verify.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="trivium"):
            assert equal("0.5", r"\frac12")
            assert not equal(r"1+x^2", r"x^2+1")
        assert caplog.text.count("compared as text, since math-verify is missing") == 1
    finally:
        math_answers.has_math_verify.cache_clear()


def test_verdicts_and_readings_are_of_the_last_box(tmp_path: Path):
    made = task(tmp_path)
    example = made.example("train", 1)  # 4 / 2
    assert example.answer == r"Half of 4 is \boxed{\frac{4}{2}}.<end>"
    assert made.verify(example, r"\boxed{2}<end>").correct
    assert made.verify(example, r"\boxed{2}").reason == "the answer does not end"
    assert made.verify(example, "2<end>").answer is None
    assert made.verify(example, r"\boxed{3}<end>").reason == r"\frac{4}{2} is right"
    readings = made.readings(example, r"\boxed{2.0}")
    assert readings["normalised"].correct
    assert made.readings(example, "2")["normalised"].answer is None
    own = Example("Halve 4.\n", "2<end>")
    assert made.verify(own, r"\boxed{2.0}<end>").correct, "a person's own row may have the answer alone"
    with ThreadPoolExecutor(1) as pool:  # where math-verify cannot be stopped
        assert pool.submit(made.verify, own, r"\boxed{2.0}<end>").result().correct
    assert [made.size(split) for split in ("train", "validation")] == [22, 5]
    assert example.tags == {"level": 1}


@needs_math_verify
def test_a_rate_by_math_verify_says_how_many_it_judged(tmp_path: Path):
    made = task(tmp_path)
    example = made.example("train", 1)  # 4 / 2
    texts = [r"\boxed{2.0}", r"\boxed{" + "2" * 400 + "}", "2"]
    scores = _rates(made, [example] * 3, texts)["readings"]
    assert scores["math_verify"]["judged"] == {"math_verify": 1, "text": 1}
    assert (scores["math_verify"]["successes"], scores["math_verify"]["unread"]) == (1, 1)
    assert "judged" not in scores["normalised"]


def test_the_answer_begins_inside_the_box(tmp_path: Path):
    (tmp_path / "bpe").mkdir()
    BytePairTokenizer(BytePairs.from_tokenizers(trained())).save(tmp_path / "bpe")
    made = task(tmp_path, tokenizer=str(tmp_path / "bpe"), longest=40)
    example = made.example("train", 0)
    ids = made.alphabet.encode(example.prompt) + made.alphabet.encode(example.answer)
    regions = made.regions(example)
    assert len(regions) == len(ids)
    answer = made.alphabet.decode([index for index, region in zip(ids, regions, strict=True) if region == ANSWER])
    assert answer.endswith("{3}{2}}.<|endoftext|>")
    assert len(answer) < 30
    batch = made.gather("train", [0, 3])
    assert batch.lengths_B.max() + 1 <= 40
    assert (
        made.max_length == max(len(made.alphabet.encode(row["problem"] + "\n" + row["solution"])) for row in ROWS) + 1
    )


def test_problems_without_a_boxed_answer_are_left_out_and_counted(tmp_path: Path, caplog):
    proof = {"problem": "Show it.", "solution": "It is clear."}
    with caplog.at_level("WARNING", logger="trivium"):
        made = task(tmp_path, [proof, *ROWS, proof])
    assert "2 of 29 problems have no \\boxed{} answer: left out" in caplog.text
    assert made.size("train") == 22
    assert made.example("train", 0).prompt == "Halve 3.\n"


def test_a_task_with_vocabulary_and_length_needs_no_file(tmp_path: Path):
    made = task(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    assert made.config.build().alphabet == made.alphabet
    with pytest.raises(
        UserError, match=r"train.jsonl: No such file or directory; trivium data prepare gets such files"
    ):
        made.config.build().example("train", 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"train.jsonl:2: not JSON"),
        ("3", r"train.jsonl:2: not an object"),
        ({"problem": "a"}, r"train.jsonl:2: solution is missing"),
        ({"problem": 3, "solution": r"\boxed{1}"}, r"train.jsonl:2: problem is not text"),
        ({"problem": "a <end>", "solution": r"\boxed{1}"}, r"train.jsonl:2: holds <end>"),
    ],
)
def test_a_row_that_is_no_problem_is_refused_with_its_line(row: Any, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        task(tmp_path, [ROWS[0], row, *ROWS[1:]])


def test_values_that_cannot_be_are_refused(tmp_path: Path):
    for options, message in (
        ({"held_out": 27}, "held_out: 27 are asked for, .* has 27 problems"),
        ({"held_out": 0}, "held_out: expected 1"),
        ({"longest": 3}, "longest: no training problem has 3 tokens or fewer"),
        ({"max_length": 1}, "max_length: expected 2 or more"),
    ):
        with pytest.raises(UserError, match=message):
            task(tmp_path, **options)
    short = task(tmp_path, max_length=20)
    with pytest.raises(UserError, match="max_length: 20 is given, a problem has"):
        short.gather("train", [0, 1])
    with pytest.raises(UserError, match=r"the task has no test problems; give their file as task\.test"):
        task(tmp_path).example("test", 0)
