import itertools

import pytest

from trivium.ops.pairs import allowed_pairs


@pytest.mark.parametrize("length", [0, 1, 7, 12])
@pytest.mark.parametrize("windows", [(None,), (3,), (20,), (5, 2), (1, 4), (None, 3)])
def test_the_count_equals_counting_one_by_one(length: int, windows: tuple[int | None, ...]):
    counted = 0
    for i in range(length):
        for keys in itertools.product(range(length), repeat=len(windows)):
            reached = [i - (w or length) < key <= i for key, w in zip(keys, windows, strict=True)]
            counted += all(reached)
    assert allowed_pairs(length, *windows) == counted
