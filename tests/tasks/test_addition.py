"""What a user of the addition task may give it, and how its answers are judged."""

import random

import numpy as np
import pytest

from trivium.config import UserError, config_hash, from_dict, to_dict
from trivium.tasks import addition, addition_sampling
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import ANSWER, CHAIN, PROMPT, TASKS, Batch, TaskConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_digits": 0}, "max_digits: expected"),
        ({"min_digits": 0}, "min_digits: expected 1 or more, got 0"),
        ({"min_digits": 4, "max_digits": 3}, "max_digits: expected min_digits"),
        ({"base": 1}, "base: expected 2 to 36, got 1"),
        ({"base": 37}, "base: expected 2 to 36, got 37"),
        ({"operands": 1}, "operands: expected 2"),
        ({"validation_fraction": 0.0}, "validation_fraction: expected"),
        ({"test_fraction": 1.0}, "test_fraction: expected"),
        ({"test_fraction": 0.6, "validation_fraction": 0.4}, "leave nothing to train on"),
        ({"format": "prefix"}, "'prefix' is not allowed"),
        ({"stratify": "digits"}, "'digits' is not allowed"),
        ({"separator": "1"}, "separator: expected"),
        ({"separator": "ab"}, "separator: expected"),
        ({"separator": "<end>"}, "separator: expected"),
        ({"separator": "<think>"}, "separator: expected"),
        ({"train_examples": 0}, "train_examples: expected"),
        ({"align": True, "zero_pad": True}, "align: given beside zero_pad"),
        ({"digits": (2,)}, "digits: expected 2 counts of 1 or more, got [2]"),
        ({"digits": (2, 0)}, "digits: expected 2 counts"),
        ({"digits": (2, 4)}, "digits: [2, 4] needs max_digits 4 or more"),
        ({"digits": (2, 3), "stratify": "carry"}, "stratify uniform"),
        # One bit and one bit: three sums, too few for three splits.
        ({"base": 2, "max_digits": 1}, "split has 0 of the 3 sums"),
        # Nine numbers make 45 sums, and a stratum of those cannot fill three splits.
        ({"base": 3, "max_digits": 2, "stratify": "carry"}, "with a longest carry chain of"),
        ({"max_digits": 200, "stratify": "carry"}, "use fewer digits"),
        # Its tables would take minutes.
        ({"operands": 100, "max_digits": 1, "stratify": "carry"}, "use fewer operands"),
    ],
)
def test_an_impossible_value_is_refused_with_one_line(values, message):
    with pytest.raises(UserError) as error:
        AdditionConfig(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_config_survives_a_round_trip_through_plain_data():
    for config in AdditionConfig.examples():
        again = from_dict(TaskConfig, to_dict(config))
        assert again == config
        assert config_hash(again) == config_hash(config)
    assert TASKS.get("addition") is AdditionConfig


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("120<end>", True),
        ("120<end><end><end>", True),
        ("99+21=120<end>", True),  # the prompt was left on
        ("120", False),  # not finished
        ("12<end>", False),  # a correct prefix
        ("12", False),
        ("1200<end>", False),
        ("0120<end>", False),
        ("120<end>5", False),
        ("121<end>", False),
        ("<end>", False),
        ("", False),
    ],
)
def test_a_plain_answer_is_right_only_when_it_is_whole_and_nothing_else(text, correct):
    task = AdditionConfig(format="plain").build()
    assert task.verify(task.parse("99+21"), text).correct is correct


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("DA8+", True),
        ("DA8+<pad><pad>", True),
        ("+E35+F63+DA8+", True),
        ("DA8", False),
        ("DA8<pad>", False),
        ("DA+", False),
        ("DA80+", False),
    ],
)
def test_the_delimiter_ends_a_delimited_answer(text, correct):
    task = AdditionConfig(format="delimited", base=16).build()
    assert task.verify(task.example_of([1342, 879]), text).correct is correct


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("<think>9+1=10 9+2+1=12</think>120<end>", True),
        ("<think>9+1=10 9+2+1=99</think>120<end>", True),  # the answer decides
        ("120<end>", True),
        ("<think>9+1=10 9+2+1=12</think>121<end>", False),
        ("<think>9+1=10 9+2+1=12</think><end>", False),
        ("<think>9+1=10 9+2+1=12 120<end>", False),
        ("<think>9+1=10</think>9+2+1=12</think>120<end>", False),
        ("9<think>9+1=10 9+2+1=12</think>120<end>", False),  # an answer stands before the chain
        ("120<think>9+1=10 9+2+1=12</think>120<end>", False),
        ("120</think>120<end>", False),
        ("<think></think>120<end>", True),
    ],
)
def test_what_follows_the_chain_decides(text, correct):
    task = AdditionConfig(format="column").build()
    assert task.verify(task.parse("99+21"), text).correct is correct


def test_a_verdict_says_what_was_read_and_what_is_wrong():
    task = AdditionConfig(format="plain").build()
    example = task.parse("99+21")
    assert task.verify(example, "121<end>").answer == "121"
    assert task.verify(example, "121<end>").reason == "120 is right"
    assert task.verify(example, "120").reason == "the answer does not end"


@pytest.mark.parametrize(
    ("format", "typed", "text", "correct"),
    [
        ("plain", "7+", "5=12<end>", True),
        ("plain", "7", "+5=12<end>", True),
        ("plain", "7+", "5=13<end>", False),
        ("plain", "7+", "5", False),
        ("plain", "7+", "5+5=17<end>", False),
        ("reversed", "12+", "9=03<end>", False),
        ("reversed", "12+", "9=12<end>", True),
        ("delimited", "12+", "9+12+", True),
        ("delimited", "12+", "9+12", False),
        ("column", "12+", "9=<think>2+9=11 1+0+1=2</think>21<end>", True),
    ],
)
def test_a_half_problem_is_checked_against_what_the_model_made_of_it(format, typed, text, correct):
    task = AdditionConfig(format=format).build()
    assert task.verify(task.parse(typed), text).correct is correct


def test_regions_put_the_closing_bracket_into_the_chain():
    task = AdditionConfig(format="column").build()
    example = task.parse("99+21")
    regions = task.regions(example)
    symbols = [task.alphabet.symbols[index] for index in task.alphabet.encode(example.prompt + example.answer)]
    assert regions[: len("99+21=")] == [PROMPT] * 6
    assert regions[symbols.index("</think>")] == CHAIN
    assert regions[symbols.index("</think>") + 1 :] == [ANSWER] * 4


def test_numbers_of_two_hundred_digits_are_added_exactly():
    task = AdditionConfig(format="reversed", min_digits=20, max_digits=200).build()
    batch = task.batch("test", 0, 8)
    assert (batch.tokens_BT == task.collate(task.examples("test", np.arange(8))).tokens_BT).all()
    for example in task.examples("test", np.arange(8)):
        a, b = example.prompt.removesuffix("=").split("+")
        assert int(a[::-1]) + int(b[::-1]) == int(example.answer.removesuffix("<end>")[::-1])


def test_readable_turns_reversed_numbers_round():
    task = AdditionConfig(format="reversed").build()
    assert task.readable("99+12=021<end>") == "99+21=120<end>"
    assert AdditionConfig(format="plain").build().readable("99+21=") == "99+21="


def test_a_finite_training_set_has_a_size():
    assert AdditionConfig(train_examples=7).build().size("train") == 7
    assert AdditionConfig().build().size("train") is None
    assert AdditionConfig(train_examples=7).build().size("test") is None
    assert len(AdditionConfig(train_examples=7).build().distinct("train", 100)) <= 7


@pytest.mark.parametrize(("rows", "stride"), [(256, 256), (1000, 1000), (100, 300), (3000, 3000)])
@pytest.mark.parametrize("format", ["reversed", "delimited", "column"])
def test_batches_that_follow_each_other_are_those_that_are_asked_for_alone(format, rows, stride):
    config = AdditionConfig(format=format, max_digits=3)
    in_order = config.build()
    for start in range(0, 12_000, stride):
        batch, alone = in_order.batch("train", start, rows), config.build().batch("train", start, rows)
        for name in Batch.__dataclass_fields__:
            ours, theirs = getattr(batch, name), getattr(alone, name)
            if name == "documents_BT":
                assert ours is theirs is None
                continue
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), name
            ours[:] = 0  # what a caller does to its batch stays out of the next
    assert np.array_equal(in_order.batch("test", 12000, 5).tokens_BT, config.build().batch("test", 12000, 5).tokens_BT)


def test_small_batches_in_order_are_drawn_many_at_once(monkeypatch):
    draws = []
    monkeypatch.setattr(addition, "draw", lambda *arguments: draws.append(1) or addition_sampling.draw(*arguments))
    task = AdditionConfig().build()
    for step in range(64):
        task.batch("train", 64 * step, 64)
    assert len(draws) == 2, "the first batch, which follows none, and one block"


def test_distinct_problems_are_those_that_one_by_one_search_finds():
    config = AdditionConfig(max_digits=2, format="plain")
    task = config.build()
    fast = task.distinct("test", 150)
    slow = super(type(task), task).distinct("test", 150)
    assert fast.tolist() == slow.tolist()


def test_distinct_stops_when_a_split_is_used_up():
    task = AdditionConfig(max_digits=1, format="plain", test_fraction=0.3).build()
    everything = {tuple(sorted((a, b))) for a in range(10) for b in range(10)}
    per_split = [
        {task.canonical(example) for example in task.examples(split, task.distinct(split, 1000))}
        for split in ("train", "validation", "test")
    ]
    assert set.union(*per_split) == everything
    assert sum(map(len, per_split)) == len(everything)
    assert task.distinct("test", 1000).tolist() == super(type(task), task).distinct("test", 1000).tolist()


def test_a_pair_of_lengths_gives_numbers_of_these_lengths():
    for align in (False, True):
        task = AdditionConfig(align=align, max_digits=20).build().at_pair(7, 3)
        for example in task.examples("test", np.arange(50)):
            assert [len(str(operand)) for operand in task.operands_of(example)] == [7, 3]
    small = AdditionConfig(max_digits=5).build().at_pair(2, 1)
    found = small.distinct("test", 1000)
    assert 20 <= len(found) < 1000  # of 900 sums one in twenty
    with pytest.raises(UserError, match="sums of 3 numbers have no two lengths"):
        AdditionConfig(operands=3).build().at_pair(2, 2)


def test_the_published_test_has_its_edges_and_the_pairs_of_its_seed():
    task = AdditionConfig(max_digits=10, zero_pad=True).build()
    examples = task.published("adderboard")
    assert len(examples) == 10_010
    assert task.operands_of(examples[4]) == [9_999_999_999] * 2
    drawn = random.Random(2025)
    assert [task.operands_of(example) for example in examples[10:13]] == [
        [drawn.randint(0, 9_999_999_999) for _ in range(2)] for _ in range(3)
    ]
    with pytest.raises(UserError, match="no test set 'public'; allowed: adderboard"):
        task.published("public")
    with pytest.raises(UserError, match="two numbers of up to 10 digits, in base 10"):
        AdditionConfig(max_digits=9).build().published("adderboard")
