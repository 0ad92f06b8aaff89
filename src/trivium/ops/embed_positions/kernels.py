"""The Triton kernel of `embed_positions`: a program has some tokens, whole."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium.ops.simplicial.triton_support import interpreted

_TILE = 4096  # numbers of a program


@triton.jit
def _embed_kernel(
    tokens, embedding, places, past, added, x, count, length, symbols, most,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    inside = m < count
    token = tl.load(tokens + m, mask=inside, other=0)
    known = (token >= 0) & (token < symbols)
    place = tl.load(past + m // length, mask=inside, other=0) + m % length
    there = place < most
    if MASKED:
        there = there | (m % length >= tl.load(added + m // length, mask=inside, other=0))
    place = tl.minimum(place, most - 1)
    wanted = inside[:, None] & (d < D)[None, :]
    e = tl.load(embedding + token[:, None] * D + d[None, :], mask=wanted & known[:, None], other=float("nan"))
    p = tl.load(places + place[:, None] * D + d[None, :], mask=wanted & there[:, None], other=float("nan"))
    y = e.to(tl.float32) + p.to(tl.float32)
    tl.store(x + m.to(tl.int64)[:, None] * D + d[None, :], y.to(x.dtype.element_ty), mask=wanted)


_kernel: Any = _embed_kernel


def _launch(tokens: Tensor, embedding: Tensor, places: Tensor, past: Tensor, added: Tensor | None) -> Tensor:
    width = embedding.shape[1]
    x = torch.empty(*tokens.shape, width, dtype=embedding.dtype, device=tokens.device)
    if not x.numel():
        return x
    wide = 1 << max(width - 1, 0).bit_length()
    block = max(1, _TILE // wide)
    _kernel[(-(-tokens.numel() // block),)](
        *(tokens, embedding, places, past, past if added is None else added, x),
        *(tokens.numel(), tokens.shape[1], *map(len, (embedding, places))),
        D=width,
        BD=wide,
        BM=block,
        MASKED=added is not None,
        num_warps=4,
    )
    return x


_operator = torch.library.custom_op("trivium::embed_positions", _launch, mutates_args=())


@_operator.register_fake
def _(tokens: Tensor, embedding: Tensor, places: Tensor, past: Tensor, added: Tensor | None) -> Tensor:
    return torch.empty(*tokens.shape, embedding.shape[1], dtype=embedding.dtype, device=tokens.device)


def by_triton(
    tokens_BT: Tensor, embedding_VD: Tensor, places_PD: Tensor, past_B: Tensor, added_B: Tensor | None
) -> Tensor:
    """Return (B, T, D); arguments as in `embed_positions`. A symbol that there is none of becomes NaN."""
    if tokens_BT.device.type == "cpu" and not interpreted():
        raise ValueError("tokens: on cpu; backend triton needs tensors on a GPU")
    given = (each.contiguous() for each in (tokens_BT, embedding_VD, places_PD, past_B))
    return _operator(*given, None if added_B is None else added_B.contiguous())
