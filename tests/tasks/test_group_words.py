"""Groups are groups, words are uniform, and each label is the product of what was read so far."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.base import ANSWER
from trivium.tasks.group_words import GroupWordsConfig
from trivium.tasks.groups import group

NAMES = {"S3": 6, "S5": 120, "A4": 12, "A5": 60, "Z2": 2, "Z7": 7, "Z60": 60, "Z2xS3": 12, "Z2xZ3xZ2": 12}


def check_it_is_a_group(table: np.ndarray) -> None:
    n = len(table)
    everything = list(range(n))
    assert table[0].tolist() == table[:, 0].tolist() == everything, "element 0 is the identity"
    assert all(sorted(row) == everything for row in table.tolist())
    assert all(sorted(row) == everything for row in table.T.tolist())
    assert (table[table[:, :, None], np.arange(n)] == table[np.arange(n)[:, None, None], table[None]]).all()


@pytest.mark.parametrize(("name", "order"), NAMES.items())
def test_a_named_group_is_a_group_of_its_order(name, order):
    found = group(name)
    assert found.order == order == len(set(found.symbols))
    check_it_is_a_group(found.table)


def test_a_table_that_is_no_group_is_caught():
    table = group("S3").table.copy()
    table[1, 2], table[1, 3] = table[1, 3], table[1, 2]
    with pytest.raises(AssertionError):
        check_it_is_a_group(table)


def test_groups_are_what_their_names_say():
    assert not (group("S3").table == group("S3").table.T).all()
    assert (group("Z6").table == group("Z6").table.T).all()
    # Of A5, which is simple, the squares of the products p q p^-1 q^-1 reach everything; of S5 only its even half.
    for name, reached in (("S5", 60), ("A5", 60), ("S3", 3), ("Z7", 1)):
        table = group(name).table
        inverse = table.argmin(axis=1)
        p, q = np.indices(table.shape)
        assert len(np.unique(table[table[p, q], table[inverse[p], inverse[q]]])) == reached


def test_the_product_does_the_first_permutation_first():
    task = GroupWordsConfig(group="S3", max_length=4).build()
    # First 1 -> 2 -> 3 -> 1, then 1 <-> 2: 1 -> 2 -> 1, 2 -> 3 -> 3, 3 -> 1 -> 2.
    assert task.parse("(231) (213)").answer == "(231)(132)<end>"
    assert task.parse("(213) (231)").answer == "(213)(321)<end>"


def test_parity_is_that_of_the_ones_so_far():
    task = GroupWordsConfig(group="Z2", max_length=30).build()
    batch = task.batch("test", 0, 40)
    for tokens, targets, length in zip(batch.tokens_BT, batch.targets_BT, batch.lengths_B, strict=True):
        assert targets[:length].tolist() == (np.cumsum(tokens[:length]) % 2).tolist()
    assert task.parse("1 1 0 1").answer == "1001<end>"


def test_labels_are_permutations_applied_one_after_the_other():
    task = GroupWordsConfig(group="S5", max_length=12).build()
    for example in task.examples("train", np.arange(20)):
        read = [word.strip("(") for word in example.prompt.split(")")[:-1]]
        wanted = [word.strip("(") for word in example.answer.split(")")[:-1]]
        images = "12345"
        for element, product in zip(read, wanted, strict=True):
            images = "".join(element[int(image) - 1] for image in images)
            assert images == product
        assert example.tags == {"length": len(read)}


def test_every_place_is_scored_with_its_own_label():
    task = GroupWordsConfig(group="S3", min_length=2, max_length=6).build()
    batch = task.batch("train", 0, 30)
    inside_BT = np.arange(batch.tokens_BT.shape[1]) < batch.lengths_B[:, None]
    assert ((batch.weights_BT == 1) == inside_BT).all()
    assert ((batch.regions_BT == ANSWER) == inside_BT).all()
    assert (batch.targets_BT[:, 0] == batch.tokens_BT[:, 0]).all(), "the first product is the first element"
    assert set(batch.lengths_B.tolist()) == {2, 3, 4, 5, 6}


def test_words_that_are_none_are_refused():
    task = GroupWordsConfig(group="S3").build()
    with pytest.raises(UserError, match="not in the alphabet"):
        task.parse("(124)")
    with pytest.raises(UserError, match="expected a word"):
        task.parse("")
    example = task.parse("(231)(213)")
    with pytest.raises(UserError, match="2 places to label, its answer has 1"):
        task.encode(type(example)(example.prompt, "(231)<end>"))


@pytest.mark.parametrize("name", ["S1", "S7", "A2", "Z1", "Z1025", "s5", "Z2x", "Q8", "", "Z1000xZ2"])
def test_an_unknown_group_lists_the_known_ones(name):
    with pytest.raises(UserError, match=r"Z2xS3|more than 1024 elements"):
        group(name)


def test_a_start_symbol_is_read_and_not_scored():
    plain, started = (
        GroupWordsConfig(group="S3", min_length=3, max_length=6, start=start).build() for start in (False, True)
    )
    assert started.max_length == plain.max_length + 1
    example = started.example("train", 4)
    assert example.prompt.startswith("<start>(")
    assert example.tags["length"] == example.prompt.count("(")
    tokens, _, weights = started.encode(example)
    assert (weights[0], set(weights[1:]), len(tokens)) == (0, {1.0}, 1 + example.tags["length"])
    assert plain.parse(example.prompt.removeprefix("<start>")).answer == example.answer
    assert started.parse(example.prompt.removeprefix("<start>")) == started.parse(example.prompt) == example
    with pytest.raises(UserError, match="expected a word of elements such as <start>"):
        started.example_of(tokens[1:])
    with pytest.raises(UserError, match="expected a word of elements such as"):
        started.example_of([tokens[0], tokens[0], tokens[1]])
