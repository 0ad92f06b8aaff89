"""Symbols and their ids."""

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
