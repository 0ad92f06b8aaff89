import pytest
import torch

from trivium.ops import OnlineScan, exclusive_scan
from trivium.ops.scan import num_combines, prefixes


def bracket(a: str, b: str) -> str:
    assert "" not in (a, b), "the identity was combined"
    return f"({a} {b})"


def names(count: int) -> list[str]:
    return [f"x{index}" for index in range(count)]


def tree(items: list[str]) -> str:
    if len(items) == 1:
        return items[0]
    half = len(items) // 2
    return bracket(tree(items[:half]), tree(items[half:]))


def by_definition(items: list[str]) -> str:
    """The binary digits of the count, from high to low, name complete subtrees; fold their roots from the left."""
    fold, start = "", 0
    for digit in reversed(range(len(items).bit_length())):
        if len(items) >> digit & 1:
            root = tree(items[start : start + 2**digit])
            fold = bracket(fold, root) if fold else root
            start += 2**digit
    return fold


class Counting:
    """An operator that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, a: str, b: str) -> str:
        self.calls += 1
        return bracket(a, b)


def test_six_chunks_by_hand():
    assert exclusive_scan(names(6), bracket, "") == [
        "",
        "x0",
        "(x0 x1)",
        "((x0 x1) x2)",
        "((x0 x1) (x2 x3))",
        "(((x0 x1) (x2 x3)) x4)",
    ]


@pytest.mark.parametrize("scan", [exclusive_scan, prefixes])
def test_every_prefix_has_the_bracketing_of_its_binary_digits(scan):
    expected = [by_definition(names(count)) for count in range(201)]
    for count in range(1, 201):
        wanted = expected[:count] if scan is exclusive_scan else expected[: count + 1]
        assert scan(names(count), bracket, "") == wanted


def test_swapped_operands_would_be_seen():
    swapped = exclusive_scan(names(7), lambda a, b: bracket(b, a), "")
    assert swapped[1:2] == ["x0"]
    assert all(a != by_definition(names(count)) for count, a in enumerate(swapped) if count > 1)


def test_the_counter_gives_the_same_prefixes_in_two_calls_a_chunk_and_keeps_few_roots():
    count = Counting()
    online = OnlineScan(count, "")
    assert online.prefix() == ""
    for pushed, name in enumerate(names(200), start=1):
        online.push(name)
        assert online.prefix() == by_definition(names(pushed))
        assert online.prefix() == by_definition(names(pushed)), "asking must not change the answer"
        assert count.calls <= 2 * pushed
        assert len(online.roots) <= pushed.bit_length()
        assert count.calls == num_combines(pushed)


def test_the_scan_combines_as_many_pairs_as_it_says():
    for chunks in range(201):
        count = Counting()
        assert len(prefixes(names(chunks), count, "")) == chunks + 1
        assert count.calls == num_combines(chunks) <= 2 * chunks


def combine_pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """An operator on batched pairs that neither commutes nor associates."""
    return torch.tanh(2 * a - b + 0.3 * a * b.flip(-1))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 21])
def test_a_tensor_of_chunks_scans_as_a_list_does(count):
    chunks = torch.randn(count, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    identity = torch.zeros(3, dtype=torch.float64)
    scanned = exclusive_scan(chunks, combine_pairs, identity)
    assert scanned.shape == chunks.shape
    one_by_one = exclusive_scan(list(chunks), combine_pairs, identity.expand(2, 3))
    online = OnlineScan(combine_pairs, identity.expand(2, 3))
    for mine, theirs, chunk in zip(scanned, one_by_one, chunks, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine, online.prefix(), rtol=0, atol=1e-12)
        online.push(chunk)


@pytest.mark.parametrize("count", [2, 63, 64, 65, 200])
def test_a_tensor_of_chunks_is_combined_level_by_level(count):
    sizes = []

    def combine(a, b):
        assert a.shape == b.shape
        sizes.append(len(a))
        return combine_pairs(a, b)

    prefixes(torch.randn(count, 4), combine, torch.zeros(4))
    assert len(sizes) <= 2 * count.bit_length()
    assert sum(sizes) == num_combines(count)


def test_gradients_pass_through_the_scan():
    chunks = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    identity = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: exclusive_scan(x, combine_pairs, identity), (chunks,))


def test_nan_in_the_identity_or_the_last_chunk_reaches_no_other_prefix():
    chunks = torch.ones(6, 2)
    chunks[-1] = torch.nan
    scanned = exclusive_scan(chunks, combine_pairs, torch.full((2,), torch.nan))
    assert scanned[0].isnan().all()
    assert not scanned[1:].isnan().any()


@pytest.mark.parametrize("count", [5, 8, 63])
def test_no_gradient_of_the_scan_fills_a_tensor_of_zeros_for_a_slice(count):
    chunks = torch.randn(count, 2, requires_grad=True)
    found, left = set(), [prefixes(chunks, lambda a, b: a + 2 * b, torch.zeros(2)).grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [parent for parent, _ in node.next_functions]
    names = {node.name() for node in found}
    assert "AddBackward0" in names
    assert not {name for name in names if "Slice" in name or "Select" in name or "Index" in name}
