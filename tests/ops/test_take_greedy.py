"""The end of a pass of greedy decoding: both forms on the same rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ops import triton_cases
from tests.ops.test_fused_linear import run as run
from trivium.ops.take_greedy import MOST, take_greedy
from trivium.registry import UserError

END = 2


def taken(rows: int, symbols: int, backend: str, passes: int = 3) -> list[Any]:
    """Return all that some passes leave behind, as lists."""
    device = triton_cases.DEVICE if backend == "triton" else "cpu"
    generator = torch.Generator().manual_seed(rows)
    budgets = torch.randint(0, passes + 2, (rows,), generator=generator)
    kept = [torch.zeros(rows, passes, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64), budgets, budgets < 1]
    kept = [
        each.to(device) for each in (*kept, torch.zeros(rows, 1, dtype=torch.int64)[:, 0], torch.zeros_like(budgets))
    ]
    for _ in range(passes):
        logits = torch.randn(rows, symbols, generator=generator).to(device)
        with triton_cases.settings():
            take_greedy(logits, *kept, END, backend=backend)
    return [each.tolist() for each in kept]


@pytest.mark.parametrize(("rows", "symbols"), [(1, 14), (70, 5), (33, 300)])
def test_one_kernel_leaves_what_the_parts_leave(run: Callable[..., Any], rows: int, symbols: int):
    assert run(taken, rows, symbols, "triton") == taken(rows, symbols, "torch")


def test_rows_end_with_the_end_symbol_or_their_budget_and_keep_what_they_had():
    tokens, place, fed = torch.full((3, 2), 9), torch.zeros(3).long(), torch.zeros(3).long()
    done, added, budgets = torch.zeros(3, dtype=torch.bool), torch.ones(3).long(), torch.tensor([5, 1, 5])
    for chosen in ([END, 0, 1], [0, 0, 3]):
        logits = torch.nn.functional.one_hot(torch.tensor(chosen), 4).float()
        take_greedy(logits, tokens, place, budgets, done, fed, added, END)
    assert tokens.tolist() == [[END, 9], [0, 9], [1, 3]]
    assert place.tolist() == [1, 1, 2]
    assert done.tolist() == [True, True, False]
    assert added.tolist() == [0, 0, 1]
    assert fed.tolist() == [0, 0, 3]


def test_too_many_symbols_for_the_kernel_are_refused_by_name():
    rows = [torch.zeros(1, 1).long(), *(torch.zeros(1).long() for _ in range(2)), torch.zeros(1, dtype=torch.bool)]
    more = [torch.zeros(1).long() for _ in range(2)]
    with pytest.raises(UserError, match="backend 'triton'"):
        take_greedy(torch.zeros(1, MOST + 1), *rows, *more, END, backend="triton")
