import torch

from trivium.model.root_counter import RootCounter, num_roots, push
from trivium.ops import OnlineScan


def combine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """An operator that neither commutes nor associates."""
    return torch.tanh(2 * a - b + 0.3 * a * b.flip(-1))


def test_rows_that_push_at_different_times_keep_the_bracketing_of_the_online_scan():
    rows, pushes = 4, 40
    generator = torch.Generator().manual_seed(0)
    shape = (rows, num_roots(pushes, 1), 1, 3)
    with torch.no_grad():
        for masked in (False, True):
            counter = RootCounter(*(torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2)))
            online = [OnlineScan(combine, torch.zeros(1, 3)) for _ in range(rows)]
            pushed_B = torch.zeros(rows, dtype=torch.int64)
            for _ in range(pushes):
                wanted_B = torch.rand(rows, generator=generator) < 0.7
                chunk_BcD = torch.randn(rows, 1, 3, dtype=torch.float64, generator=generator)
                rows_N = torch.arange(rows) if masked else wanted_B.nonzero()[:, 0]
                mask = wanted_B if masked else None
                counter, prefix_NcD = push(counter, combine, rows_N, chunk_BcD[rows_N], pushed_B[rows_N], mask)
                for n, b in enumerate(rows_N.tolist()):
                    if wanted_B[b]:
                        online[b].push(chunk_BcD[b])
                        torch.testing.assert_close(prefix_NcD[n], online[b].prefix(), rtol=0, atol=1e-12)
                pushed_B += wanted_B


def test_under_grad_the_old_counter_stays_and_under_no_grad_it_is_the_new_one():
    counter = RootCounter(*(torch.zeros(1, 2, 1, 3) for _ in range(2)))
    row_N, chunk_NcD, none_N = torch.tensor([0]), torch.ones(1, 1, 3), torch.tensor([0])
    new, _ = push(counter, combine, row_N, chunk_NcD, none_N, None)
    assert counter.roots_BRcD.count_nonzero() == 0
    assert new.roots_BRcD.count_nonzero() == 3
    with torch.no_grad():
        new, _ = push(counter, combine, row_N, chunk_NcD, none_N, None)
    assert new.roots_BRcD.data_ptr() == counter.roots_BRcD.data_ptr()
    assert counter.roots_BRcD.count_nonzero() == 3


def test_a_row_keeps_at_most_the_logarithm_of_its_chunks():
    assert [num_roots(length, 4) for length in (0, 3, 4, 11, 12, 15, 16, 40_000)] == [0, 0, 1, 2, 2, 2, 3, 14]
