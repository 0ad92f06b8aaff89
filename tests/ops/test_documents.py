"""Packed documents by ids and by offsets: the same results, and bad ones refused by name."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from trivium.ops import document_ids, gated_delta_rule, gated_linear_attention, simplicial_attention


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def simplicial(documents: Tensor, rows: int, tokens: int, backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    inputs = [draw(rows, tokens, heads, 3) for heads in (2, 1, 1, 1, 1)]
    o = simplicial_attention(*inputs, window1=5, window2=3, documents=documents, backend=backend)
    return [o, *torch.autograd.grad(o.square().sum(), inputs)]


def linear(documents: Tensor, rows: int, tokens: int, backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (draw(rows, tokens, 2, 3) for _ in range(3))
    log_decay = -draw(rows, tokens, 2, 3).detach().square()
    o, state = gated_linear_attention(q, k, v, log_decay, documents=documents, backend=backend)
    return [o, state, *torch.autograd.grad(o.square().sum(), [q, k, v])]


def delta(documents: Tensor, rows: int, tokens: int, backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (draw(rows, tokens, 2, 3) for _ in range(3))
    log_decay = -draw(rows, tokens, 2).detach().square()
    beta = draw(rows, tokens, 2).detach().sigmoid()
    o, state = gated_delta_rule(q, k, v, beta, log_decay, documents=documents, backend=backend)
    return [o, state, *torch.autograd.grad(o.square().sum(), [q, k, v])]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_count_the_documents_through_all_rows(dtype: torch.dtype):
    ids = document_ids(torch.tensor([0, 1, 5, 6, 10], dtype=dtype), 5, rows=2)
    assert ids.tolist() == [[0, 1, 1, 1, 1], [2, 3, 3, 3, 3]]
    assert document_ids(torch.tensor([0], dtype=dtype), 0).shape == (1, 0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("run", [simplicial, linear, delta])
@pytest.mark.parametrize(("offsets", "rows"), [([0, 4, 5, 11], 1), ([0, 4, 11, 18, 22], 2)])
def test_offsets_keep_documents_apart_as_their_ids_do(run: Any, offsets: list[int], rows: int, backend: str):
    counts = [after - first for first, after in itertools.pairwise(offsets)]
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).view(rows, 11)
    found, wanted = (run(documents, rows, 11, backend) for documents in (torch.tensor(offsets), ids))
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(wanted[0], run(torch.zeros_like(ids), rows, 11, backend)[0])


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([1, 4, 12], "documents: offsets: from 1 to 12; they go from 0 to 12, the tokens of 2 rows of 6"),
        ([0, 6, 11], "documents: offsets: from 0 to 11; they go from 0 to 12"),
        ([0, 6, 13], "documents: offsets: from 0 to 13; they go from 0 to 12"),
        ([], "documents: offsets: none; they go from 0 to 12"),
        ([0, 4, 4, 6, 12], "documents: offsets: 4, then 4; each is larger than the one before"),
        ([0, 5, 3, 6, 12], "documents: offsets: 5, then 3; each is larger than the one before"),
        ([0, 4, 12], "documents: offsets: document 1 holds the tokens 4 to 11 of rows of 6; it must lie in one row"),
        ([0.0, 6.0, 12.0], "documents: torch.float32 of shape (3,); give ids, integers (2, 6), or offsets"),
        ([False, True], "documents: torch.bool of shape (2,); give ids"),
        ([[[0, 6, 12]]], "documents: torch.int64 of shape (1, 1, 3); give ids"),
    ],
)
def test_offsets_that_are_none_are_refused(documents: list[Any], message: str):
    inputs = [torch.zeros(2, 6, 1, 4) for _ in range(5)]
    given = torch.tensor(documents) if documents else torch.tensor(documents, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        simplicial_attention(*inputs, window1=3, window2=2, documents=given)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        gated_linear_attention(*inputs[:4], documents=given)


def test_offsets_on_another_device_are_refused():
    inputs = [torch.zeros(2, 6, 1, 4) for _ in range(5)]
    with pytest.raises(ValueError, match="documents: on meta, but q is on cpu"):
        simplicial_attention(*inputs, window1=3, window2=2, documents=torch.zeros(3, dtype=torch.int64, device="meta"))


def test_offsets_of_rows_without_tokens_are_checked_too():
    with pytest.raises(ValueError, match="offsets: 5, then 0; each is larger"):
        document_ids(torch.tensor([0, 5, 0]), 0)


def test_what_is_compiled_asks_for_ids(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"the host cannot read them under torch\.compile.*give ids"):
        document_ids(torch.tensor([0, 6]), 6)
