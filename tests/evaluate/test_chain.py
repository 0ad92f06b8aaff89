import pytest

from tests.scripted import solver
from trivium.evaluate.answers import evaluate
from trivium.evaluate.chain import chain_scores
from trivium.evaluate.config import EvaluateConfig
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.answers import THINK_END

CHAINS = ("column", "reversed_chain")


def chain_of(task, write, examples=40):
    return evaluate(solver(task, write), task, EvaluateConfig(examples=examples, batch=16))["chain"]


def rates_of(chain):
    return {name: entry["rate"] for name, entry in chain.items() if name != "problems"}


def ignore_chain(example, written):
    return example.answer


def follow_chain(task):
    def write(example, written):
        chain, closing, _ = written.partition(THINK_END)
        if not closing:
            return example.answer
        return chain + closing + str(task.answer_from_steps(example, written)) + "<end>"

    return write


@pytest.mark.parametrize("format", CHAINS)
def test_a_model_that_ignores_its_chain_does_not_change_its_answer(format):
    task = AdditionConfig(format=format, min_digits=2).build()
    rates = rates_of(chain_of(task, ignore_chain))
    assert rates == {
        "steps_true": 1,
        "steps_wanted": 1,
        "all_steps_true": 1,
        "answer_follows": 1,
        "corrupted_changes": 0,
        "corrupted_follows": 0,
    }


@pytest.mark.parametrize("format", CHAINS)
def test_a_model_that_follows_its_chain_follows_it_into_error(format):
    task = AdditionConfig(format=format, min_digits=2).build()
    chain = chain_of(task, follow_chain(task))
    assert set(rates_of(chain).values()) == {1.0}
    assert chain["corrupted_changes"]["n"] == 40
    assert 0.9 < chain["corrupted_changes"]["low"] < chain["corrupted_changes"]["high"] == 1


def test_a_changed_answer_need_not_be_the_one_that_the_chain_leads_to():
    task = AdditionConfig(format="column", min_digits=2).build()

    def confused(example, written):
        chain, closing, _ = written.partition(THINK_END)
        if not closing or example.answer.startswith(chain + closing):
            return example.answer
        return chain + closing + "777777<end>"

    rates = rates_of(chain_of(task, confused))
    assert (rates["corrupted_changes"], rates["corrupted_follows"]) == (1, 0)


def test_a_sampled_answer_is_not_held_against_the_greedy_one_of_a_corrupted_chain():
    task = AdditionConfig(format="column", min_digits=2).build()
    model = solver(task, ignore_chain)
    indices = task.distinct("test", 20)
    examples = task.examples("test", indices)
    # As sampled at a high temperature: whole chains with answers that the model, going on greedily, does not give.
    texts = [example.answer.partition(THINK_END)[0] + THINK_END + "777<end>" for example in examples]
    scores = chain_scores(model, task, examples, texts)
    assert scores is not None
    assert (scores["corrupted_changes"]["rate"], scores["corrupted_changes"]["n"]) == (0, 20)


def test_false_steps_are_counted_one_by_one():
    task = AdditionConfig(format="column", min_digits=3, max_digits=3).build()

    def first_step_false(example, written):
        head, rest = example.answer.split("=", 1)
        return head + "=" + str((int(rest[0]) + 1) % 10) + rest[1:]

    chain = chain_of(task, first_step_false)
    assert chain["steps_true"] == chain["steps_true"] | {"successes": 80, "n": 120}
    assert chain["steps_wanted"] == chain["steps_true"]
    assert chain["all_steps_true"]["successes"] == 0


def test_a_true_step_of_other_digits_a_missing_one_and_one_too_many_are_not_wanted():
    task = AdditionConfig(format="column", min_digits=3, max_digits=3).build()

    def two_of_three_and_a_stray(example, written):
        first, _, third = example.answer.partition(THINK_END)[0].removeprefix("<think>").split(" ")
        return f"<think>{first} 0+0=0 {third} 1+1=2</think>1<end>"

    chain = chain_of(task, two_of_three_and_a_stray, examples=20)
    assert (chain["steps_true"]["successes"], chain["steps_true"]["n"]) == (80, 80)
    zeros = sum("0+0=0" in task.example("test", i).answer.split(" ")[1:2] for i in task.distinct("test", 20))
    assert (chain["steps_wanted"]["successes"], chain["steps_wanted"]["n"]) == (40 + zeros, 60)
    cut = chain_of(task, lambda example, _: example.answer.split(" ")[0] + "</think>1<end>", examples=20)
    assert (cut["steps_wanted"]["successes"], cut["steps_wanted"]["n"]) == (20, 60)


def test_a_right_answer_behind_a_chain_that_leads_elsewhere_does_not_follow():
    task = AdditionConfig(format="column", min_digits=2, max_digits=2).build()

    def chain_of_ones(example, written):
        return "<think>0+1=1 0+1=1</think>" + example.answer.partition(THINK_END)[2]

    rates = rates_of(chain_of(task, chain_of_ones))
    assert (rates["steps_true"], rates["all_steps_true"]) == (1, 1)
    assert rates["answer_follows"] < 0.1


def test_an_answer_without_its_chain_has_no_step_to_judge():
    task = AdditionConfig(format="column", min_digits=2).build()
    chain = chain_of(task, lambda example, _: example.answer.partition(THINK_END)[2])
    assert chain["steps_true"]["rate"] is None
    assert chain["steps_wanted"]["rate"] == 0
    assert (chain["all_steps_true"]["rate"], chain["answer_follows"]["rate"]) == (0, 0)
    assert (chain["corrupted_changes"]["rate"], chain["corrupted_changes"]["n"]) == (None, 0)


def test_problems_that_want_no_chain_are_left_out():
    task = AdditionConfig(format="column", max_digits=2, test_fraction=0.3).build()
    result = evaluate(solver(task, ignore_chain), task, EvaluateConfig(examples=150))
    one_digit = result["by_tag"]["digits"]["1"]["n"]
    assert one_digit > 0
    assert result["chain"]["problems"] == 150 - one_digit


@pytest.mark.parametrize("format", ["plain", "reversed", "delimited"])
def test_formats_without_a_chain_have_no_chain_scores(format):
    task = AdditionConfig(format=format).build()
    assert chain_of(task, ignore_chain, examples=5) is None
