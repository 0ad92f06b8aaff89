"""`simplicial_decode` in plain PyTorch: pair by pair as the formulas say, and with masks over whole rings.

Shapes: B rows, T newest tokens, H query heads, G key/value heads, D head width, C slots, S keys.
"""

from typing import Any

import torch
from torch import Tensor

from trivium.ops.simplicial.forms import widen
from trivium.ops.simplicial.masked import masked_factorized, masked_simplicial
from trivium.ops.simplicial.reference import reference


def ring_reference(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor | None, lengths: Tensor, **options: Any
) -> Tensor:
    """Return o (B, T, H, D): each row's rings unrolled into a sequence, whose last tokens the full operator gives."""
    out_dtype = q.dtype
    q, k1, k2, v1 = widen(q, k1, k2, v1)
    tokens, rows = q.shape[1], []
    for b, length in enumerate(lengths.tolist()):
        first = max(length - max(k1.shape[1], k2.shape[1]), 0)
        sequence = max(length - first, 1)

        def unrolled(ring: Tensor, b: int = b, first: int = first, length: int = length) -> Tensor:
            held = range(max(length - ring.shape[1], 0), length)
            row = ring.new_zeros(1, max(length - first, 1), *ring.shape[2:])
            for position in held:
                row[:, position - first] = ring[b, position % ring.shape[1]]
            return row

        there = min(tokens, length)
        queries = torch.cat((q.new_zeros(1, sequence, *q.shape[2:]), q[b : b + 1, tokens - there :]), dim=1)
        values = [unrolled(v1), None if v2 is None else unrolled(v2.to(q.dtype))]
        o = reference(queries[:, there:], unrolled(k1), unrolled(k2), *values, bias=None, documents=None, **options)
        nothing = q.new_zeros(1, tokens - there, *q.shape[2:])
        rows.append(torch.cat((nothing, o[:, sequence - there :]), dim=1))
    return torch.cat(rows).to(out_dtype)


def ring_simplicial(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor | None,
    lengths: Tensor,
    *,
    window1: int,
    window2: int,
    scale: float,
    form: str,
) -> Tensor:
    """Return o (B, T, H, D); arguments as in `simplicial_decode`, already checked."""
    tokens = q.shape[1]
    query_BT = lengths[:, None] - tokens + torch.arange(tokens, device=q.device)
    # A softmax over nothing would be NaN: a query before the first token reads the oldest slot, and is zeroed below.
    there_BT = query_BT >= 0
    query_BT = query_BT.clamp(min=0)
    newest_B1 = (lengths[:, None] - 1).clamp(min=0)

    def positions(ring: Tensor) -> Tensor:
        slots = ring.shape[1]
        return newest_B1 - (newest_B1 - torch.arange(slots, device=q.device)) % slots

    def visible(position_BS: Tensor, window: int) -> Tensor:
        age_BTS = query_BT[:, :, None] - position_BS[:, None, :]
        return (age_BTS >= 0) & (age_BTS < window) & (position_BS >= 0)[:, None, :]

    at1, at2 = positions(k1), positions(k2)
    read1, read2 = visible(at1, window1), visible(at2, window2)
    if v2 is None:
        at = positions(v1)
        read = visible(at, min(window1, window2))
        places = [at.clamp(min=0) % keys.shape[1] for keys in (k1, k2)]
        o = masked_factorized(q, k1, k2, v1, read1, read2, read, *places, scale=scale)
    else:
        o = masked_simplicial(q, k1, k2, v1, v2, read1, read2, scale=scale, form=form)
    return o.masked_fill(~there_BT[:, :, None, None], 0)
