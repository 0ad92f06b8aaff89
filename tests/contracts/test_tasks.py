"""Every registered task keeps the contract, and each check of it catches a task that does not."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from tests.contracts import task_checks
from tests.contracts.task_checks import CHECKS
from trivium.tasks.addition import Addition, AdditionConfig
from trivium.tasks.base import ANSWER, CHAIN, TASKS, Task, Verdict
from trivium.tasks.group_words import GroupWords, GroupWordsConfig


@pytest.mark.parametrize("name", TASKS.names())
def test_every_task_keeps_the_contract(name, tmp_path):
    configs = TASKS.get(name).examples(tmp_path)
    if not configs and TASKS.get(name).extra:
        pytest.skip(f"the extra {TASKS.get(name).extra!r} is not installed")
    assert configs
    for config in configs:
        task = config.build()
        for check in CHECKS:
            check(task)
        assert config.resolved().build().alphabet == task.alphabet


def broken(format: str = "column", **methods: Callable) -> Task:
    """Return an addition task some of whose methods are replaced; each gets the honest task first."""
    honest = AdditionConfig(format=format, max_digits=3).build()

    class Broken(Addition):
        pass

    for name, method in methods.items():
        setattr(Broken, name, lambda self, *arguments, _method=method, **named: _method(honest, *arguments, **named))
    task = Broken(honest.config)
    # Purity is checked against a task built anew: that one is broken in the same way.
    task.config = BuildsBroken(task)
    return task


class BuildsBroken:
    """Stands in for a config whose `build` gives the broken task again."""

    def __init__(self, task: Task):
        self._task, self._config = task, task.config

    def build(self) -> Task:
        return self._task

    def __getattr__(self, name: str) -> object:
        return getattr(self._config, name)


def forgetful_example() -> Callable:
    calls = iter(range(10**6))
    return lambda task, split, index, stage=0: Addition.example(task, split, index + next(calls))


def shifted(task: Task, split: str, indices: np.ndarray, stage: int = 0):
    return Addition.gather(task, split, np.asarray(indices) + 1)


def weighted_prompt(task: Task, example):
    tokens, targets, _ = Addition.encode(task, example)
    return tokens, targets, [1.0] * len(tokens)


def leaking(task: Task, split: str, indices: np.ndarray, stage: int = 0):
    return Addition.examples(task, "train", indices)


def prefix_is_enough(task: Task, example, text: str) -> Verdict:
    return Verdict(bool(text) and example.answer.startswith(text.removeprefix(example.prompt).removesuffix("<end>")))


def end_is_optional(task: Task, example, text: str) -> Verdict:
    honest = Addition.verify(task, example, text)
    return honest if honest.correct else Addition.verify(task, example, text + "<end>")


def prompt_stays_on(task: Task, example, text: str) -> Verdict:
    return Verdict(False) if text.startswith(example.prompt) else Addition.verify(task, example, text)


def repeating(task: Task, split: str, count: int, stage: int = 0):
    return np.arange(count) // 2


def tag_of_carries_only(task: Task, split: str, indices: np.ndarray, stage: int = 0):
    examples = Addition.examples(task, split, indices)
    return [dataclasses.replace(each, tags={"carries": 1} if each.tags["carries"] else {}) for each in examples]


def tags_a_problem_late(task: Task, split: str, indices: np.ndarray, stage: int = 0):
    return Addition.tag_values(task, split, indices + 1)


def unchained(task: Task, example):
    return [ANSWER if region == CHAIN else region for region in Addition.regions(task, example)]


PLANTED = [
    (task_checks.check_example_is_a_pure_function_of_its_index, {"example": forgetful_example()}),
    (task_checks.check_batch_equals_collated_examples, {"gather": shifted}),
    (task_checks.check_a_batch_holds_what_encode_gives, {"encode": weighted_prompt}),
    (task_checks.check_splits_share_no_problem, {"examples": leaking}),
    (task_checks.check_only_the_whole_answer_is_right, {"verify": prefix_is_enough}),
    (task_checks.check_only_the_whole_answer_is_right, {"verify": end_is_optional}),
    (task_checks.check_only_the_whole_answer_is_right, {"verify": prompt_stays_on}),
    (task_checks.check_distinct_problems_differ, {"distinct": repeating}),
    (task_checks.check_every_problem_has_the_same_tags, {"examples": tag_of_carries_only}),
    (task_checks.check_tag_values_are_those_of_the_examples, {"tag_values": tags_a_problem_late}),
    (task_checks.check_what_has_steps_has_a_chain, {"regions": unchained}),
]


@pytest.mark.parametrize(("check", "methods"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_check_catches_its_planted_bug(check, methods):
    check(broken())
    with pytest.raises(AssertionError):
        check(broken(**methods))


def test_a_bound_that_is_too_short_is_caught():
    task = broken()
    task.max_length = 10
    with pytest.raises(AssertionError):
        task_checks.check_max_length_bounds_every_problem(task)


def test_a_symbol_that_swallows_its_neighbours_is_caught():
    task = broken("plain")
    # With "=1" as a symbol the end of the prompt is read differently once an answer follows.
    task.alphabet = dataclasses.replace(task.alphabet, symbols=(*task.alphabet.symbols, "=1"))
    with pytest.raises(AssertionError):
        task_checks.check_text_and_tokens_are_the_same(task)


class LabelsTheNext(GroupWords):
    """Tells at each place the product that only the next element leads to."""

    def encode(self, example):
        tokens, targets, weights = super().encode(example)
        return tokens, [*targets[1:], targets[0]], weights


class LabelsLate(GroupWords):
    """As above in whole batches, which are encoded apart."""

    def answer(self, problems):
        labels, lengths = super().answer(problems)
        return np.roll(labels, 1, axis=1), lengths


@pytest.mark.parametrize(
    ("broken_task", "check"),
    [
        (LabelsTheNext, task_checks.check_a_batch_holds_what_encode_gives),
        (LabelsLate, task_checks.check_batch_equals_collated_examples),
    ],
)
def test_labels_at_the_wrong_place_are_caught(broken_task, check):
    config = GroupWordsConfig(group="S3", max_length=6)
    check(GroupWords(config))
    with pytest.raises(AssertionError):
        check(broken_task(config))


def test_each_check_has_a_planted_bug():
    caught = {check for check, _ in PLANTED}
    caught |= {
        task_checks.check_max_length_bounds_every_problem,
        task_checks.check_text_and_tokens_are_the_same,
    }
    assert caught == set(CHECKS)
