"""Attention of short sequences: the Triton backend, on a GPU or interpreted, and when it is not taken."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.ops import triton_cases as cases
from trivium.mixers.attention import AttentionConfig
from trivium.mixers.base import MixerContext
from trivium.ops import dispatch
from trivium.ops.packed_attention import LONGEST, WIDEST, fits_registers, packed_attention, tile
from trivium.registry import UserError

pytest.importorskip("triton")
on_a_gpu = pytest.mark.skipif(not cases.GPU, reason="needs a GPU")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Give a function that calls another where Triton runs."""
    if cases.GPU:
        yield lambda function, *arguments: cases.call(None, function, *arguments)
        return
    with cases.interpreter() as pool:
        yield lambda function, *arguments: cases.call(pool, function, *arguments)


# Tokens, query heads, key heads, head width, window.
SHAPES = [(18, 4, 4, 64, None), (1, 2, 1, 16, None), (7, 6, 2, 5, 3), (33, 2, 2, 24, None), (64, 2, 1, 8, 17)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_output_and_gradient_equal_the_float64_formula(run: Run, shape: tuple[int, ...]):
    errors = run(cases.packed_errors, *shape)
    assert all(error < 1e-5 for error in errors.values()), errors


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (50, 4, 2, 128, None)], ids=lambda shape: "-".join(map(str, shape)))
def test_half_precision_stays_close_to_float64(run: Run, shape: tuple[int, ...], dtype: torch.dtype):
    errors = run(cases.packed_errors, *shape, dtype)
    assert all(error < (1e-2 if dtype == torch.bfloat16 else 2e-3) for error in errors.values()), errors


def test_what_the_kernels_cannot_do_is_refused_by_name():
    backend = dispatch._registered["packed_attention"]["triton"]
    assert backend.refuses({}) is None
    assert "heads too wide" in (backend.refuses({"fits": "no"}) or "")
    assert "reference" in (backend.refuses({"attention": "reference"}) or "")
    assert "float64" in (backend.refuses({"dtype": torch.float64}) or "")
    if not cases.GPU:
        with pytest.raises(UserError, match="backend 'triton' is missing"):
            packed_attention(torch.randn(1, 4, 3, 2), 1, backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_head_is_taken_that_a_tile_does_not_hold(dtype: torch.dtype):
    taken = [(t, d) for t in range(1, 80) for d in range(1, 600) if fits_registers(t, d, dtype)]
    assert all(tile(tokens) >= tokens and tile(width) >= width for tokens, width in taken)
    assert max(width for _, width in taken) == WIDEST
    assert max(tokens for tokens, _ in taken) == LONGEST


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, 3), (4, 9)])
def test_packed_heads_give_what_attention_gives_of_its_parts(kv_heads: int, window: int | None, backend: str):
    x = torch.randn(2, 6, 4 + 2 * kv_heads, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q, k, v = x.split((4, kv_heads, kv_heads), dim=2)
    found = packed_attention(x, kv_heads, window, attention_backend=backend)
    for t in range(6):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(4):
            g = h * kv_heads // 4
            logits = torch.einsum("bk,bsk->bs", q[:, t, h], k[:, first : t + 1, g]) / 3**0.5
            wanted = torch.einsum("bs,bsk->bk", logits.softmax(-1), v[:, first : t + 1, g])
            torch.testing.assert_close(found[:, t, h], wanted, rtol=0, atol=1e-12)


def test_a_recipe_that_names_attentions_backend_gets_it():
    dispatch.forget()
    context = MixerContext(width=8, heads=2, max_length=6, backends={"attention": "reference"})
    mixer = AttentionConfig().build(context)
    mixer(torch.randn(2, 6, 8))
    assert dispatch.chosen()["attention"]["backend"] == "reference"
    assert dispatch.chosen()["packed_attention"]["backend"] == "torch"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's compiler imports it
def test_it_compiles_whole_for_every_length():
    mixer = AttentionConfig(window=4).build(MixerContext(width=8, heads=2, max_length=99))
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9, 70):
        x = torch.randn(2, tokens, 8)
        torch.testing.assert_close(compiled(x)[0], mixer(x)[0])
