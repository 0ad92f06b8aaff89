"""Embeddings of tokens and places: both forms on the same rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.ops import triton_cases
from tests.ops.fused_cases import draw
from tests.ops.test_fused_linear import run as run
from trivium.ops import dispatch
from trivium.ops.embed_positions import embed_positions


@torch.no_grad()
def embedded(rows: int, tokens: int, width: int, dtype: torch.dtype, backend: str, masked: bool = False) -> Any:
    generator = torch.Generator().manual_seed(rows)
    tokens_BT, past_B = (
        torch.randint(high, size, generator=generator).to(triton_cases.DEVICE)
        for high, size in ((7, (rows, tokens)), (9, (rows,)))
    )
    tables = draw(7, width, dtype=dtype), draw(9, width, dtype=dtype, seed=1)
    with triton_cases.settings():
        added_B = past_B % (tokens + 1) if masked else None
        return embed_positions(tokens_BT, *tables, past_B, added_B, backend=backend).float().cpu().numpy()


# Of the second the last rows go beyond the table.
@pytest.mark.parametrize("shape", [(1, 1, 16), (70, 3, 40)], ids=str)
def test_one_kernel_gives_what_the_parts_give(run: Callable[..., Any], shape: tuple[int, ...]):
    for masked in (False, True):
        found = run(embedded, *shape, torch.float16, "triton", masked)
        np.testing.assert_array_equal(found, embedded(*shape, torch.float16, "torch", masked))


def test_a_place_is_looked_up_behind_what_a_row_has_seen():
    x = embed_positions(
        torch.tensor([[1, 0]]), torch.tensor([[1.0], [2.0]]), torch.arange(4.0)[:, None] * 10, torch.tensor([2])
    )
    assert x.tolist() == [[[22.0], [31.0]]]


def test_a_rows_own_token_whose_place_the_table_lacks_is_no_number():
    tokens_BT, past_B = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([2, 3])
    tables = torch.zeros(1, 1), torch.arange(4.0)[:, None]
    x_BT = embed_positions(tokens_BT, *tables, past_B, torch.tensor([3, 1]))[..., 0]
    np.testing.assert_array_equal(x_BT, [[2, 3, np.nan], [3, 3, 3]])
    np.testing.assert_array_equal(embed_positions(tokens_BT, *tables, past_B)[1, :, 0], [3, np.nan, np.nan])


@pytest.mark.skipif(not triton_cases.GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_kernel_gives_what_the_parts_give_on_a_gpu(dtype: torch.dtype):
    for shape in ((1000, 1, 256), (1000, 10, 768), (1, 300, 2048)):
        np.testing.assert_array_equal(embedded(*shape, dtype, "triton"), embedded(*shape, dtype, "torch"))


def test_what_the_kernel_cannot_do_is_refused():
    refuses = dispatch._registered["embed_positions"]["triton"].refuses
    assert refuses({}) is None
    assert "gradients are on" in (refuses({"gradient": True}) or "")
    assert "two dtypes" in (refuses({"one dtype": "no"}) or "")
    assert "float64" in (refuses({"dtype": torch.float64}) or "")
