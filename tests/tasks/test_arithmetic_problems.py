"""Generated word problems: distinct, solved right step by step, and written as GSM8K writes its solutions."""

import re

import pytest

from trivium.config import UserError, from_dict
from trivium.tasks import arithmetic_problems as module
from trivium.tasks.arithmetic_problems import ArithmeticProblemsConfig, draw, solve
from trivium.tasks.arithmetic_templates import TEMPLATES
from trivium.tasks.base import ANSWER, SPLITS, TaskConfig
from trivium.tasks.calculator import annotations, holds

SMALL = ArithmeticProblemsConfig(train_examples=150, held_out=15)
TASK = SMALL.build()


@pytest.mark.parametrize("split", SPLITS)
def test_every_step_is_true_and_the_last_gives_the_answer(split):
    for index in range(TASK.size(split)):
        example = TASK.example(split, index)
        solution = example.answer.removesuffix("<end>")
        steps = annotations(solution)
        assert len(steps) == example.tags["steps"] >= 2
        assert all(holds(*step) for step in steps)
        assert re.fullmatch(r"#### \d+", solution.splitlines()[-1])
        assert solution.splitlines()[-1] == f"#### {steps[-1][1]}"
        # What stands before an annotation is the same calculation, as in GSM8K: 48/2 = <<48/2=24>>24.
        for expression, result in steps:
            assert f"{expression} = <<{expression}={result}>>{result}" in solution
        assert TASK.verify(example, example.answer).correct
        assert all(step.true for step in TASK.steps(example, solution))


def test_numbers_of_the_solution_come_from_the_question_or_from_steps_before():
    for index in range(TASK.size("train")):
        example = TASK.example("train", index)
        known = set(re.findall(r"\d+", example.prompt)) | {"2", "3", "100"}  # half, three days, percent, both sides
        for expression, result in annotations(example.answer):
            assert set(re.findall(r"\d+", expression)) <= known, example
            known.add(result)


def test_problems_are_distinct_and_no_split_shares_one():
    names = [TASK.canonical(TASK.example(split, index)) for split in SPLITS for index in range(TASK.size(split))]
    assert len(set(names)) == len(names) == 180


def test_names_and_goods_do_not_make_another_problem():
    example = TASK.example("train", 0)
    other = module.Example(re.sub(r"[A-Z][a-z]+", "Zelda", example.prompt), example.answer, example.tags)
    assert TASK.canonical(other) == TASK.canonical(example)


def test_every_template_is_used_and_every_one_can_be_solved():
    found = {example.tags["template"] for number in range(300) if (example := draw(0, number, "<end>")) is not None}
    assert found == {template.name for template in TEMPLATES}
    assert len(TEMPLATES) == len({template.name for template in TEMPLATES}) >= 20


def test_fractions_and_results_of_nothing_are_drawn_again():
    change = next(template for template in TEMPLATES if template.name == "change")
    words = {"who": "Ulla", "goods": "mugs"}
    assert solve(change, {"a": 10, "b": 5, "c": 50}, words) is None
    assert solve(change, {"a": 10, "b": 5, "c": 49}, words) is None
    solution = solve(change, {"a": 10, "b": 5, "c": 60}, words)
    assert (
        solution
        == "The mugs cost 10*5 = <<10*5=50>>50 dollars.\nUlla gets back 60-50 = <<60-50=10>>10 dollars.\n#### 10"
    )
    half = next(template for template in TEMPLATES if template.name == "half")
    assert solve(half, {"a": 15}, {}) is None


def test_the_answer_region_is_the_number_and_the_end():
    for index in range(20):
        example = TASK.example("train", index)
        ids = TASK.alphabet.encode(example.prompt) + TASK.alphabet.encode(example.answer)
        answer = [i for i, region in zip(ids, TASK.regions(example), strict=True) if region == ANSWER]
        assert TASK.alphabet.decode(answer) == example.answer.rpartition("#### ")[2]


def test_answers_are_read_as_gsm8k_reads_them():
    example = next(
        TASK.example("train", i) for i in range(150) if int(TASK.example("train", i).answer[:-5].split()[-1]) > 999
    )
    number = example.answer.removesuffix("<end>").split()[-1]
    for text, right in (
        (f"#### {number}<end>", True),
        (f"#### ${int(number):,}.<end>", True),
        (f"#### 1\n#### {number}<end>", True),
        (f"#### {number}\n#### 1<end>", False),
        (f"{number}<end>", False),
        (f"#### {number}", False),
    ):
        assert TASK.verify(example, text).correct == right, text


def test_seeds_give_other_problems_and_the_same_seed_the_same():
    other = ArithmeticProblemsConfig(train_examples=150, held_out=15, seed=1).build()
    assert SMALL.build().example("train", 7) == TASK.example("train", 7)
    assert other.example("train", 7) != TASK.example("train", 7)


def test_a_task_with_its_length_makes_no_problem_to_be_built(monkeypatch: pytest.MonkeyPatch):
    config = TASK.config
    monkeypatch.setattr(module, "draw", None)
    assert config.build().max_length == TASK.max_length


def test_bad_values_are_refused():
    for values, message in (
        ({"train_examples": 0}, "train_examples: expected 1 or more"),
        ({"held_out": 0}, "held_out: expected 1 or more"),
        ({"max_length": 1}, "max_length: expected 2 or more"),
    ):
        with pytest.raises(UserError, match=message):
            from_dict(TaskConfig, {"kind": "arithmetic_problems", **values})
    short = ArithmeticProblemsConfig(train_examples=5, held_out=2, max_length=40).build()
    with pytest.raises(UserError, match="max_length: 40 is given, a train problem has"):
        short.batch("train", 0, 2)
    with pytest.raises(IndexError, match="no number 150"):
        TASK.example("train", 150)


def test_templates_that_run_out_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TEMPLATES", [t for t in TEMPLATES if t.name == "half"])
    monkeypatch.setattr(module, "STALE", 300)
    with pytest.raises(UserError, match=r"distinct train problems and no more in 301 draws; 5000 are asked for"):
        ArithmeticProblemsConfig(held_out=1).build()


def test_every_template_reads_its_own_names_alone():
    for template in TEMPLATES:
        known = set(template.numbers)
        for step in template.steps:
            assert set(re.findall("[a-z]", step.expression)) <= known, template.name
            assert step.sentence.count("{=}") == 1
            known.add(step.name)
        used = {name for step in template.steps for name in re.findall("[a-z]", step.expression)}
        assert set(template.numbers) <= used, f"{template.name}: a number that nothing needs"
