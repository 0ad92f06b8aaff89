"""2-simplicial attention of some queries over given keys: what streaming needs, where keys lie in ring buffers.

Shapes: B rows, T queries, H query heads, G key/value heads, D head width, S1 and S2 keys of either side. Which keys a
query may read is said by masks; each query must have at least one on either side.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trivium.ops.simplicial.forms import determinant_as_trilinear_keys, determinant_as_trilinear_query, widen
from trivium.ops.simplicial.windowed import TILE


def masked_simplicial(
    q_BTHD: Tensor,
    k1_BSGD: Tensor,
    k2_BSGD: Tensor,
    v1_BSGD: Tensor,
    v2_BSGD: Tensor,
    allowed1_BTS: Tensor,
    allowed2_BTS: Tensor,
    *,
    scale: float,
    form: str,
) -> Tensor:
    """Return o (B, T, H, D) of the trilinear or determinant form, in bounded chunks of queries."""
    out_dtype = q_BTHD.dtype
    with torch.autocast(q_BTHD.device.type, enabled=False):
        q, k1, k2, v1, v2 = widen(q_BTHD, k1_BSGD, k2_BSGD, v1_BSGD, v2_BSGD)
        if form == "determinant":
            q, (k1, k2) = determinant_as_trilinear_query(q), determinant_as_trilinear_keys(k1, k2)
        # Virtual queries come from the side with fewer keys.
        long, short = (k1, v1, allowed1_BTS), (k2, v2, allowed2_BTS)
        if k1.shape[1] < k2.shape[1]:
            long, short = short, long
        batch, tokens, heads, _ = q.shape
        logits_per_query = batch * heads * k1.shape[1] * k2.shape[1]
        step = max(1, TILE.get(q.device.type, TILE["cuda"]) // max(1, logits_per_query))
        parts = []
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            arguments = (q[:, part], *long[:2], long[2][:, part], *short[:2], short[2][:, part], scale)
            if torch.is_grad_enabled() and step < tokens:
                parts.append(checkpoint(_chunk, *arguments, use_reentrant=False))
            else:
                parts.append(_chunk(*arguments))
        return torch.cat(parts, dim=1).to(out_dtype)


def _chunk(
    q_BTHD: Tensor,
    k_long_BLGD: Tensor,
    v_long_BLGE: Tensor,
    long_BTL: Tensor,
    k_short_BSGD: Tensor,
    v_short_BSGE: Tensor,
    short_BTS: Tensor,
    scale: float,
) -> Tensor:
    batch, tokens, heads, _ = q_BTHD.shape
    kv_heads, short = k_short_BSGD.shape[2], k_short_BSGD.shape[1]
    k_long, v_long, k_short, v_short = (
        x.transpose(1, 2) for x in (k_long_BLGD, v_long_BLGE, k_short_BSGD, v_short_BSGE)
    )
    q_BGgT1D = q_BTHD.transpose(1, 2).unflatten(1, (kv_heads, heads // kv_heads))[..., None, :]
    virtual_BGRD = (q_BGgT1D * (scale * k_short)[:, :, None, None]).flatten(2, 4)
    logits = (virtual_BGRD @ k_long.transpose(-1, -2)).unflatten(2, (heads // kv_heads, tokens, short))
    allowed_BTSL = long_BTL[:, :, None, :] & short_BTS[:, :, :, None]
    weights = logits.masked_fill(~allowed_BTSL[:, None, None], -torch.inf).flatten(-2).softmax(-1)
    read = (weights.view(batch, kv_heads, -1, k_long.shape[2]) @ v_long).view(*logits.shape[:5], -1)
    return (read * v_short[:, :, None, None]).sum(-2).flatten(1, 2).transpose(1, 2)


def masked_softmax(q_BTHD: Tensor, k_BSGD: Tensor, allowed_BTS: Tensor, scale: float) -> Tensor:
    """Return (B, G, H/G, T, S) attention weights, of which the factorized form multiplies two."""
    kv_heads = k_BSGD.shape[2]
    q_BGgTD = q_BTHD.transpose(1, 2).unflatten(1, (kv_heads, q_BTHD.shape[2] // kv_heads))
    logits = scale * (q_BGgTD @ k_BSGD.permute(0, 2, 3, 1)[:, :, None])
    return logits.masked_fill(~allowed_BTS[:, None, None], -torch.inf).softmax(-1)


def masked_factorized(
    q_BTHD: Tensor,
    k1_BSGD: Tensor,
    k2_BSGD: Tensor,
    v_BSGD: Tensor,
    allowed1_BTS: Tensor,
    allowed2_BTS: Tensor,
    allowed_v_BTS: Tensor,
    place1_BS: Tensor,
    place2_BS: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return o (B, T, H, D) of the factorized form; value s stands at place1[s] among k1 and at place2[s] among k2."""
    out_dtype = q_BTHD.dtype
    with torch.autocast(q_BTHD.device.type, enabled=False):
        q, k1, k2, v = widen(q_BTHD, k1_BSGD, k2_BSGD, v_BSGD)
        weights1, weights2 = masked_softmax(q, k1, allowed1_BTS, scale), masked_softmax(q, k2, allowed2_BTS, scale)

        def at(weights: Tensor, place_BS: Tensor) -> Tensor:
            return weights.gather(-1, place_BS[:, None, None, None].expand(*weights.shape[:4], -1))

        both = (at(weights1, place1_BS) * at(weights2, place2_BS)).masked_fill(~allowed_v_BTS[:, None, None], 0)
        return (both @ v.transpose(1, 2)[:, :, None]).flatten(1, 2).transpose(1, 2).to(out_dtype)
