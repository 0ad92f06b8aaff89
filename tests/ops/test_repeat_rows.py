"""Rows of a table, each as often as asked for, and the sums of their gradients."""

import pytest
import torch

from trivium.ops.repeat_rows import repeat_rows


def test_rows_and_both_gradients_are_those_of_indexing():
    rows, index = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([[4, 0, 4], [2, 2, 2]])
    assert torch.equal(repeat_rows(rows, index), rows[index])
    assert torch.autograd.gradcheck(lambda given: repeat_rows(given, index), rows)
    assert torch.autograd.gradgradcheck(lambda given: repeat_rows(given, index) ** 2, rows)


def test_gradients_in_bfloat16_are_summed_in_float32():
    rows = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    repeat_rows(rows, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert rows.grad is not None
    assert rows.grad.flatten().tolist() == [1000.0, 0.0]  # in bfloat16 alone 256 + 1 is 256


def test_no_places_give_no_rows_and_wrong_ones_are_refused():
    assert repeat_rows(torch.zeros(2, 3), torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 3)
    with pytest.raises(IndexError):
        repeat_rows(torch.zeros(2, 3), torch.tensor([2]))
    with pytest.raises(ValueError, match="needed is"):
        repeat_rows(torch.zeros(2), torch.tensor([0]))
