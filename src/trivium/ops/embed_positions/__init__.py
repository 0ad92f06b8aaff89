"""Embeddings of tokens and of their places, for passes without gradients that go on where a state stands.

Shapes: B rows, T new tokens, D width, V symbols, P places that the table has.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.simplicial import triton_support


def embed_positions(
    tokens_BT: Tensor,
    embedding_VD: Tensor,
    places_PD: Tensor,
    past_B: Tensor,
    added_B: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return (B, T, D), the embedding of each token and that of its place, `past_B` + t.

    Of the `added_B` tokens that are a row's own (None: all T) one whose place the table lacks becomes NaN, since no
    device can raise; what lies behind them takes the last place at most. The backends are "torch", "reference" and
    "triton", which has no gradient. Raises UserError for a backend that is missing or cannot.
    """
    facts = (
        ("dtype", embedding_VD.dtype),
        ("one dtype", "yes" if embedding_VD.dtype == places_PD.dtype else "no"),
        ("gradient", torch.is_grad_enabled()),
    )
    function = dispatch.load("embed_positions", backend, tokens_BT.device.type, facts)
    return function(tokens_BT, embedding_VD, places_PD, past_B, added_B)


def _parts(
    tokens_BT: Tensor, embedding_VD: Tensor, places_PD: Tensor, past_B: Tensor, added_B: Tensor | None
) -> Tensor:
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    place_BT = past_B[:, None] + index_T
    lacking_BT = place_BT >= len(places_PD)
    if added_B is not None:
        lacking_BT = lacking_BT & (index_T < added_B[:, None])
    x_BTD = embedding_VD[tokens_BT] + places_PD[place_BT.clamp_max(len(places_PD) - 1)]
    return x_BTD.masked_fill(lacking_BT[..., None], torch.nan)


def _refuses(facts: Mapping[str, Any]) -> str | None:
    if facts.get("gradient"):
        return "it has no gradient, and gradients are on"
    if facts.get("one dtype", "yes") == "no":
        return "tables of two dtypes"
    if facts.get("dtype", triton_support.DTYPES[0]) not in triton_support.DTYPES:
        return f"dtype {facts['dtype']}; allowed: bfloat16, float16, float32"
    return None


def _load_triton() -> Callable[..., Tensor]:
    from trivium.ops.embed_positions.kernels import by_triton

    return by_triton


dispatch.register("embed_positions", "reference", dispatch.Backend(lambda: _parts))
dispatch.register(
    "embed_positions",
    "torch",
    dispatch.Backend(lambda: _parts, suits=lambda device_type: "PyTorch's own, one by one"),
)
dispatch.register(
    "embed_positions",
    "triton",
    dispatch.Backend(_load_triton, missing=triton_support.missing, suits=triton_support.suits, refuses=_refuses),
)
