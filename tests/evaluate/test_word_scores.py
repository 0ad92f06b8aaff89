"""GSM8K's two rules, the constant baseline, calculators, and two runs side by side."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripted import ScriptedModel
from trivium.config import UserError
from trivium.evaluate.answers import evaluate
from trivium.evaluate.compare import compare_with, read_answers
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.statistics import mcnemar
from trivium.generate.calculator import completion, generate_with_calculator, written
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.tasks.word_answers import flexible_number, strict_number
from trivium.tasks.word_problems import WordProblemsConfig


def problems(folder: Path) -> Any:
    numbers = (5, 5, 5, 7, 8, 9, 12)
    for name, shift in (("train", 0), ("test", 1)):
        rows = [
            {
                "question": f"{n} and {shift}, {place}?",
                "answer": f"It is <<{n}+{shift}={n + shift}>>.\n#### {n + shift}",
            }
            for place, n in enumerate(numbers)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return WordProblemsConfig(folder / "train.jsonl", folder / "test.jsonl", held_out=1).build()


def writer(task: Any, write: Any) -> ScriptedModel:
    """Return a model that reads a test problem and writes `write(example)` behind its prompt."""
    alphabet = task.alphabet
    answers = {
        tuple(alphabet.encode(example.prompt)): alphabet.encode(write(example)) for example in task.problems("test")
    }

    def script(history: tuple[int, ...]) -> int:
        for prompt, answer in answers.items():
            if history[: len(prompt)] == prompt:
                done = len(history) - len(prompt)
                return answer[done] if done < len(answer) else alphabet.end_id
        return alphabet.end_id

    return ScriptedModel(script, len(alphabet), 200)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 3 left.\n#### 1,234", "1234", "1234"),
        ("#### 18.\nmore 19", "18", "19"),
        ("#### -7", "-7", "-7"),
        ("#### $18", None, "18"),
        ("it costs $1,050.00.", None, "1050.00"),
        ("#### 1\n#### 2", "1", "2"),
        ("no number", None, None),
        ("####5", None, "5"),
        ("", None, None),
    ],
)
def test_numbers_are_read_by_both_rules(text: str, strict: str | None, flexible: str | None):
    assert (strict_number(text), flexible_number(text)) == (strict, flexible)


def test_both_rules_and_the_constant_answer_are_reported(tmp_path: Path):
    task = problems(tmp_path)
    first = task.example("test", 0)

    def write(example: Any) -> str:
        wanted = strict_number(example.answer)
        if example == first:
            return "is it and?<end>"
        if wanted == "6":
            return f"It is {wanted}.<end>"
        return f"#### {wanted}<end>"

    answers: list[dict[str, Any]] = []
    scores = evaluate(writer(task, write), task, EvaluateConfig(examples=99), answers=answers)
    assert scores["exact_match"]["successes"] == 4
    strict, flexible = scores["readings"]["strict"], scores["readings"]["flexible"]
    assert (strict["successes"], strict["unread"], strict["n"]) == (4, 3, 7)
    assert (flexible["successes"], flexible["unread"]) == (6, 1)
    assert flexible["low"] < flexible["rate"] < flexible["high"]
    # Most training problems have the answer 5, which no test problem has.
    assert scores["constant"]["answer"] == "#### 5<end>"
    assert scores["constant"]["successes"] == 0
    assert scores["answer_loss"] > 0
    assert [row["readings"]["flexible"] for row in answers] == [False, *[True] * 6]
    assert answers[0]["answer"] is None
    assert json.loads(json.dumps(scores)) == scores


def test_a_constant_answer_counts_where_it_is_right(tmp_path: Path):
    task = problems(tmp_path)
    model = writer(task, lambda example: "<end>")
    assert evaluate(model, task, EvaluateConfig(examples=99), split="train")["constant"]["successes"] == 3


def test_the_constant_answer_is_the_whole_training_files(tmp_path: Path):
    rows = [{"question": f"{place}?", "answer": f"#### {n}"} for place, n in enumerate((6, 6, 7, 4, 4, 4))]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for held_out in (1, 3):  # without the last three, 6 would be the most frequent
        task = WordProblemsConfig(train, train, held_out=held_out).build()
        assert task.constant_answer() == "#### 4<end>"


def test_the_answer_loss_is_the_mean_of_the_answers_tokens_alone(tmp_path: Path):
    task = problems(tmp_path)
    config = DecoderConfig(width=16, heads=2, layers="attention*1")
    torch.manual_seed(0)
    model = config.build(model_context(task, config)).eval()
    nats: list[float] = []
    for example in task.problems("test"):
        ids = task.alphabet.encode(example.prompt + example.answer)
        # The number and the end symbol, behind "#### ".
        answer = len(example.answer.split("#### ")[1].removesuffix("<end>")) + 1
        with torch.no_grad():
            shares = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
        nats += [-shares[place - 1, ids[place]].item() for place in range(len(ids) - answer, len(ids))]
    scores = evaluate(model, task, EvaluateConfig(examples=99))
    assert scores["answer_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_of_the_steps_that_are_written_the_true_ones_are_counted(tmp_path: Path):
    task = problems(tmp_path)
    written = iter(
        ("<<1+1=2>>, <<2+1=9>>#### 6<end>", "<<2+2=5>>#### 6<end>", "#### 6<end>", "<<1+=2>> <<0+9=9>>#### 8<end>")
    )
    texts = {example.prompt: next(written, "it<end>") for example in task.problems("test")}
    chain = evaluate(writer(task, lambda example: texts[example.prompt]), task, EvaluateConfig(examples=99))["chain"]
    # True are 1+1=2 and 0+9=9; 1+ is no expression, and its step is false.
    assert (chain["steps_true"]["successes"], chain["steps_true"]["n"]) == (2, 5)
    assert (chain["all_steps_true"]["successes"], chain["all_steps_true"]["n"]) == (0, 7)


def test_the_calculator_completes_what_the_model_gets_wrong(tmp_path: Path):
    task = problems(tmp_path)
    wrong = writer(task, lambda example: example.answer.split("=")[0] + "=99>>.\n#### 3<end>")
    texts = generate_with_calculator(wrong, task.alphabet, [e.prompt for e in task.problems("test")], 60, batch=3)
    for example, text in zip(task.problems("test"), texts, strict=True):
        begun = example.answer.split("\n")[0].removesuffix(".")
        assert text.startswith(begun)
        assert all(step.true for step in task.steps(example, text))
    scores = evaluate(wrong, task, EvaluateConfig(examples=99), calculator=True)
    assert scores["chain"]["steps_true"]["successes"] == 0
    assert set(scores["calculator_assisted"]) == {"exact_match", "readings"}
    assert "calculator_assisted" not in evaluate(wrong, task, EvaluateConfig(examples=9))


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("he has <<48/2=", "24>>"),
        ("<<1/8=", "0.125>>"),
        ("<<100/3=", "33.33>>"),
        ("<<3-5=", "-2>>"),
        ("<<0.1-0.2=", "-0.1>>"),
        ("<<2+2", None),
        ("<<1/0=", None),
        ("<<x+1=", None),
        ("48/2=", None),
        ("<<1+1=2>> and 3=", None),
    ],
)
def test_an_open_expression_is_completed(text: str, filled: str | None):
    assert completion(text) == filled


def test_values_are_written_as_solutions_write_them():
    assert [written(Fraction(*pair)) for pair in ((7, 1), (1, 3), (-1, 4), (10**9, 1), (1, 64))] == [
        "7",
        "0.33",
        "-0.25",
        "1000000000",
        "0.015625",
    ]


def test_mcnemars_test_is_the_exact_one():
    # 1 against 9 discordant pairs: 2 (1 + 10) / 2^10.
    first = [True] * 9 + [False] * 1 + [True] * 4 + [False] * 6
    second = [False] * 9 + [True] * 1 + [True] * 4 + [False] * 6
    found = mcnemar(first, second)
    assert (found["first_only"], found["second_only"], found["both"], found["neither"]) == (9, 1, 4, 6)
    assert found["p"] == pytest.approx(22 / 1024)
    assert mcnemar(second, first)["p"] == found["p"]
    assert mcnemar(first, first)["p"] == 1
    assert mcnemar([True] * 3000, [False] * 3000)["p"] == 0.0
    with pytest.raises(ValueError, match="2 verdicts beside 1"):
        mcnemar([True, False], [True])


def test_two_runs_are_compared_problem_by_problem(tmp_path: Path):
    task = problems(tmp_path)
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    evaluate(writer(task, lambda example: example.answer), task, EvaluateConfig(examples=99), answers=ours)
    evaluate(writer(task, lambda example: "6<end>"), task, EvaluateConfig(examples=99), answers=theirs)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in theirs), encoding="utf-8")
    found = compare_with(ours, read_answers(path))
    assert (found["exact_match"]["first_only"], found["exact_match"]["second_only"]) == (7, 0)
    assert (found["flexible"]["first_only"], found["flexible"]["both"]) == (4, 3)
    with pytest.raises(UserError, match="6 answers, of 7 problems here"):
        compare_with(ours, theirs[1:])
    with pytest.raises(UserError, match=r"problem 1 is .* there and .* here"):
        compare_with(ours, theirs[::-1])
    path.write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"answers.jsonl:1: not a row that trivium eval --answers wrote"):
        read_answers(path)
