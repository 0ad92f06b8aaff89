"""Embeddings of tokens and places: both forms on the same rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ops import triton_cases
from tests.ops.fused_cases import draw
from tests.ops.test_fused_linear import run as run
from trivium.ops import dispatch
from trivium.ops.embed_positions import embed_positions


@torch.no_grad()
def embedded(rows: int, tokens: int, width: int, dtype: torch.dtype, backend: str) -> Any:
    generator = torch.Generator().manual_seed(rows)
    tokens_BT, past_B = (
        torch.randint(high, size, generator=generator).to(triton_cases.DEVICE)
        for high, size in ((7, (rows, tokens)), (9, (rows,)))
    )
    tables = draw(7, width, dtype=dtype), draw(9, width, dtype=dtype, seed=1)
    with triton_cases.settings():
        return embed_positions(tokens_BT, *tables, past_B, backend=backend).float().cpu().numpy()


# Of the second the last rows would go beyond the table.
@pytest.mark.parametrize("shape", [(1, 1, 16), (70, 3, 40)], ids=str)
def test_one_kernel_gives_what_the_parts_give(run: Callable[..., Any], shape: tuple[int, ...]):
    found = run(embedded, *shape, torch.float16, "triton")
    assert (found == embedded(*shape, torch.float16, "torch")).all()


def test_a_place_is_looked_up_behind_what_a_row_has_seen():
    x = embed_positions(
        torch.tensor([[1, 0]]), torch.tensor([[1.0], [2.0]]), torch.arange(4.0)[:, None] * 10, torch.tensor([2])
    )
    assert x.tolist() == [[[22.0], [31.0]]]


@pytest.mark.skipif(not triton_cases.GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_kernel_gives_what_the_parts_give_on_a_gpu(dtype: torch.dtype):
    for shape in ((1000, 1, 256), (1000, 10, 768), (1, 300, 2048)):
        assert (embedded(*shape, dtype, "triton") == embedded(*shape, dtype, "torch")).all()


def test_what_the_kernel_cannot_do_is_refused():
    refuses = dispatch._registered["embed_positions"]["triton"].refuses
    assert refuses({}) is None
    assert "gradients are on" in (refuses({"gradient": True}) or "")
    assert "two dtypes" in (refuses({"one dtype": "no"}) or "")
    assert "float64" in (refuses({"dtype": torch.float64}) or "")
