"""Position ids of the worked example, and of alphabets whose digits are not where one expects them."""

import numpy as np
import pytest

from trivium.data.positions import block_ids, token_ids
from trivium.tasks.addition import AdditionConfig


@pytest.mark.parametrize(
    ("base", "text", "ids"),
    [
        (10, "+1342+879+2221+", [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0]),
        # Digit ids were once hard-coded before the vocabulary had letters.
        (16, "+F3+", [0, 1, 2, 0]),
        (10, "12", [1, 2]),
        (10, "+", [0]),
        (10, "", []),
    ],
)
def test_block_ids_count_inside_each_run_of_digits(base, text, ids):
    alphabet = AdditionConfig(format="delimited", base=base).build().alphabet
    assert block_ids(np.array(alphabet.encode(text), dtype=np.int64), alphabet.digit_ids).tolist() == ids


def test_block_ids_of_a_batch_are_those_of_its_rows():
    task = AdditionConfig(format="column").build()
    tokens_BT = task.batch("train", 0, 9).tokens_BT
    rows = [block_ids(row, task.alphabet.digit_ids).tolist() for row in tokens_BT]
    assert block_ids(tokens_BT, task.alphabet.digit_ids).tolist() == rows


def test_token_ids_count_from_the_start_of_each_row():
    assert token_ids(np.zeros((2, 3))).tolist() == [[0, 1, 2], [0, 1, 2]]
