"""Python multiplies the same, and the chain leads to the product step by step."""

import re

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.base import ANSWER, CHAIN, PROMPT
from trivium.tasks.multiplication import MultiplicationConfig


def test_products_are_written_as_documented():
    assert MultiplicationConfig().build().render(12, 34) == "21*43=804<end>"
    assert MultiplicationConfig(chain=True).build().render(12, 34) == "21*43=<think>84+063(804)</think>804<end>"
    plain = MultiplicationConfig(chain=True, reversed=False).build()
    assert plain.render(120, 306) == "120*306=<think>720+00(720)+36000(36720)</think>36720<end>"
    short = MultiplicationConfig(chain=True, last_sum=False).build()
    assert short.render(12, 34) == "21*43=<think>84+063</think>804<end>"
    assert short.render(12, 4) == "21*4=<think>84</think>84<end>"
    assert short.render(12, 345) == "21*543=<think>06+084(045)+0063</think>0414<end>"
    padded = MultiplicationConfig(min_length=2, max_length=2, zero_pad=True, chain=True).build()
    assert padded.render(12, 34) == "21*43=<think>840+0630(8040)</think>8040<end>"


@pytest.mark.parametrize("config", MultiplicationConfig.examples())
def test_drawn_products_are_those_that_python_computes(config):
    task = config.build()
    for example in task.examples("train", np.arange(60)):
        first, second = task.operands_of(example.prompt)
        answer = example.answer.partition("</think>")[2] or example.answer
        assert task.number_of_text(answer.removesuffix("<end>")) == first * second
        if config.chain:
            assert all(step.true for step in task.steps(example, example.answer))
            assert task.answer_from_steps(example, example.answer) == answer.removesuffix("<end>")


def test_the_chain_is_scored_apart_from_the_answer():
    task = MultiplicationConfig(chain=True).build()
    batch, examples = task.batch("train", 0, 20), task.examples("train", np.arange(20))
    for b, example in enumerate(examples):
        chain = example.answer.partition("</think>")[0] + "</think>"
        counts = [int((batch.regions_BT[b] == region).sum()) for region in (PROMPT, CHAIN, ANSWER)]
        sizes = [len(task.alphabet.encode(text)) for text in (example.prompt, chain, example.answer)]
        assert counts == [sizes[0] - 1, sizes[1], sizes[2] - sizes[1]]


def test_a_step_is_true_by_its_own_arithmetic():
    task = MultiplicationConfig(chain=True).build()
    example = task.parse("12*34")
    # 48, then 360 and 48 + 360; a wrong partial product with a right sum, and the other way round.
    for chain, truths in (
        ("84+063(804)", [True, True]),
        ("94+063(904)", [False, True]),
        ("84+073(814)", [True, False]),
        ("84+063(904)", [True, False]),
        ("84+063", [True, False]),
        ("84+063(804)+0000(804)", [True, True, False]),
    ):
        steps = task.steps(example, f"<think>{chain}</think>804<end>")
        assert [step.true for step in steps] == truths, chain
    assert task.steps(example, "804<end>") == []


def test_a_last_product_without_a_sum_is_true_by_itself_and_leads_to_the_answer():
    task = MultiplicationConfig(chain=True, last_sum=False).build()
    example = task.parse("12*345")
    for chain, truths, answer in (
        ("06+084(045)+0063", [True, True, True], "0414"),
        ("06+084(045)+0073", [True, True, False], "0424"),
        ("06+084(055)+0063", [True, False, True], "0514"),
        ("06+084(045)+0063(0414)", [True, True, False], None),
        ("06+084+0063", [True, False, True], None),
    ):
        text = f"<think>{chain}</think>0414<end>"
        assert [step.true for step in task.steps(example, text)] == truths, chain
        if answer is not None:
            assert task.answer_from_steps(example, text) == answer
    rng = np.random.default_rng(0)
    for drawn in task.examples("test", np.arange(20)):
        corrupted = task.corrupt_step(drawn, drawn.answer, rng)
        if corrupted is not None:
            assert task.answer_from_steps(drawn, corrupted) not in (None, task.answer_from_steps(drawn, drawn.answer))


def test_a_corrupted_chain_leads_to_another_number():
    for reverse in (True, False):
        task = MultiplicationConfig(chain=True, reversed=reverse).build()
        rng = np.random.default_rng(0)
        for example in task.examples("test", np.arange(30)):
            corrupted = task.corrupt_step(example, example.answer, rng)
            if corrupted is None:  # a product of one digit may be all that there is to change
                continue
            assert corrupted != example.answer
            follows = task.answer_from_steps(example, corrupted)
            assert follows not in (None, task.answer_from_steps(example, example.answer))
            assert corrupted.partition("</think>")[2] == example.answer.partition("</think>")[2]
        assert task.corrupt_step(task.parse("12*34"), "804<end>", rng) is None


def test_both_orders_of_a_pair_lie_in_one_split():
    task = MultiplicationConfig(max_length=2).build()
    seen = {
        split: {task.canonical(example) for example in task.examples(split, np.arange(500))}
        for split in ("train", "validation", "test")
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    orders = {task.operands_of(example.prompt) for example in task.examples("train", np.arange(500))}
    assert any(first > second for first, second in orders)
    assert any(first < second for first, second in orders)


def test_the_split_does_not_depend_on_how_numbers_are_written():
    written = [
        MultiplicationConfig(max_length=2, reversed=reverse, zero_pad=pad, chain=chain).build()
        for reverse, pad, chain in (
            (True, False, False),
            (False, False, True),
            (True, True, False),
            (False, True, True),
        )
    ]
    problems = [{task.canonical(example) for example in task.examples("test", np.arange(400))} for task in written]
    assert all(problem == problems[0] for problem in problems[1:])


def test_a_second_number_of_fixed_length_has_it():
    task = MultiplicationConfig(min_length=3, max_length=5, second_length=2).build()
    for example in task.examples("train", np.arange(40)):
        assert re.fullmatch(r"\d{3,5}\*\d{2}=", example.prompt)
        assert example.tags["second_digits"] == 2


@pytest.mark.parametrize("wrong", ["12", "12*", "*3", "12*3*4", "12*3=36", "1A*2", ""])
def test_what_is_no_product_is_refused(wrong):
    with pytest.raises(UserError, match="write two numbers in base 10"):
        MultiplicationConfig().build().parse(wrong)


@pytest.mark.parametrize("changes", [{"base": 1}, {"second_length": 0}, {"max_length": 0}])
def test_wrong_configs_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        MultiplicationConfig(**changes).build()


def test_people_read_the_most_significant_digit_first():
    task = MultiplicationConfig(chain=True).build()
    assert task.readable("<think>84+063(804)</think>804<end>") == "<think>48+360(408)</think>408<end>"


def test_a_pair_of_lengths_gives_numbers_of_these_lengths():
    task = MultiplicationConfig(max_length=4).build().at_pair(3, 2)
    for example in task.examples("test", range(20)):
        assert [len(str(number)) for number in task.operands_of(example.prompt)] == [3, 2]
