import pytest
import torch

from trivium.mixers import cache


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_ring_holds_the_last_positions_whatever_the_pieces(slots: int, grad: bool):
    generator = torch.Generator().manual_seed(slots)
    length_B = torch.zeros(3, dtype=torch.int64)
    ring = torch.zeros(3, slots, 1, 1)
    with torch.set_grad_enabled(grad):
        for _ in range(12):
            tokens = int(torch.randint(1, 6, (), generator=generator))
            added_B = torch.randint(0, tokens + 1, (3,), generator=generator)
            # What is written is its own position plus one; what lies behind the row's tokens must not be written.
            place_BT = length_B[:, None] + torch.arange(tokens)
            new = torch.where(torch.arange(tokens) < added_B[:, None], place_BT + 1.0, torch.nan)[..., None, None]
            ring = cache.write(ring, new, length_B, added_B)
            length_B = cache.advance(length_B, added_B, tokens)
            expected = cache.slot_positions(length_B, slots).clamp(min=-1) + 1.0
            assert torch.equal(ring[..., 0, 0], expected)
            newest = [sorted(range(max(0, int(n) - slots), int(n))) for n in length_B]
            assert [sorted(row[row > 0].sub(1).int().tolist()) for row in ring] == newest


def test_under_no_grad_the_ring_is_written_in_place_and_under_grad_it_is_not():
    new, empty = torch.ones(2, 3, 1, 1), torch.zeros(2, dtype=torch.int64)
    for tokens in (1, 3):
        ring = torch.zeros(2, 4, 1, 1)
        assert cache.write(ring, new[:, :tokens], empty, None) is not ring
        assert not ring.any()
        with torch.no_grad():
            assert cache.write(ring, new[:, :tokens], empty, None) is ring
        assert ring.sum() == 2 * tokens


def test_a_row_that_outgrows_its_room_is_refused_and_one_that_forgets_by_design_is_not():
    length_B = torch.tensor([2, 5])
    cache.check_room(length_B, None, 3, 8, None)
    with pytest.raises(ValueError, match="sequence of 9 tokens does not fit the state's room of 8"):
        cache.check_room(length_B, None, 4, 8, None)
    with pytest.raises(ValueError, match="sequence of 9 tokens does not fit the state's room of 8"):
        cache.check_room(length_B, torch.tensor([4, 4]), 4, 8, 512)
    cache.check_room(length_B, torch.tensor([6, 3]), 6, 8, 512)
    cache.check_room(length_B, None, 4, 8, 8)


def test_visible_keys_are_the_written_ones_within_the_window():
    allowed = cache.visible(torch.tensor([[4, 5]]), torch.tensor([[-1, 0, 2, 3, 4, 5, 6]]), 3)
    assert allowed.tolist() == [
        [[False, False, True, True, True, False, False], [False, False, False, True, True, True, False]]
    ]
