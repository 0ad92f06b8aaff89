"""Symbols and their ids."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.tasks.alphabet import Alphabet

ALPHABET = Alphabet(("0", "1", "<", "<end>", "<endless>", " "), ("0", "1"))


def test_the_longest_symbol_is_read_first():
    assert ALPHABET.encode("1<endless><end>< 0") == [1, 4, 3, 2, 5, 0]
    assert ALPHABET.decode([1, 4, 3, 2, 5, 0]) == "1<endless><end>< 0"


def test_a_foreign_character_is_named_with_its_place():
    with pytest.raises(UserError, match=r"character 'x' at place 3 of '10x'.*space"):
        ALPHABET.encode("10x")


def test_a_symbol_given_twice_or_named_but_missing_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Alphabet(("0", "0", "<end>"))
    with pytest.raises(ValueError, match="not in the alphabet"):
        Alphabet(("0", "<end>"), ("1",))


def test_rows_are_decoded_as_one_by_one():
    rng = np.random.default_rng(3)
    alphabet = Alphabet((*"0123456789", "+", "=", "<end>", "<think>"), tuple("0123456789"))
    ids_BT = rng.integers(0, len(alphabet), (40, 9))
    starts_B = rng.integers(0, 10, 40)
    ends_B = np.minimum(starts_B + rng.integers(0, 10, 40), 9)
    wanted = [alphabet.decode(row[start:end]) for row, start, end in zip(ids_BT, starts_B, ends_B, strict=True)]
    assert alphabet.decode_rows(ids_BT, starts_B, ends_B) == wanted
    assert alphabet.decode_rows(ids_BT, starts_B, starts_B) == [""] * 40
    assert alphabet.decode_rows(ids_BT[:0], starts_B[:0], ends_B[:0]) == []


def test_a_character_that_begins_a_longer_symbol_is_not_taken_alone():
    alphabet = Alphabet(("a", "b", "ab", "<end>"))
    assert alphabet.encode("aab") == [0, 2]
    assert alphabet.encode("bb") == [1, 1]
    assert alphabet.encode("ba") == [1, 0]
