"""2-simplicial attention exactly as its formulas say (arXiv 2507.02754): every triple at once, memory B*H*T^3.

Shapes: B rows, T tokens, H query heads, G key/value heads, D head width; i query, j and k keys.
"""

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor | None,
    *,
    window1: int,
    window2: int,
    scale: float,
    form: str,
    bias: tuple[Tensor, Tensor] | None,
    documents: Tensor | None,
) -> Tensor:
    """Return o (B, T, H, D); arguments as in `simplicial_attention`, already checked."""
    out_dtype, groups = q.dtype, q.shape[2] // k1.shape[2]
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    q, (k1, k2, v1) = q.to(wide), (x.to(wide).repeat_interleave(groups, dim=2) for x in (k1, k2, v1))
    read1, read2 = (allowed(q.shape[1], window, documents, q.device)[:, None] for window in (window1, window2))
    if v2 is None:  # form="factorized"
        weights1 = (scale * torch.einsum("bihd,bjhd->bhij", q, k1)).masked_fill(~read1, -torch.inf).softmax(-1)
        weights2 = (scale * torch.einsum("bihd,bjhd->bhij", q, k2)).masked_fill(~read2, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bhij,bjhd->bihd", weights1, weights2, v1).to(out_dtype)
    v2 = v2.to(wide).repeat_interleave(groups, dim=2)
    if bias is not None:
        k2, v2 = (x + b.to(wide).repeat_interleave(groups, dim=0) for x, b in ((k2, bias[0]), (v2, bias[1])))
    weights = pair_weights(q, k1, k2, read1, read2, scale=scale, form=form)
    return torch.einsum("bhijk,bkhd,bjhd->bihd", weights, v2, v1).to(out_dtype)


def pair_weights(q: Tensor, k1: Tensor, k2: Tensor, read1: Tensor, read2: Tensor, *, scale: float, form: str) -> Tensor:
    """Return S (B, H, i, j, k), what each query weighs each pair with; keys with as many heads as queries.

    `read1` and `read2` (B or 1, 1, i, keys) bool say which keys a query may read.
    """
    q = scale * q
    logits = determinant(q, k1, k2) if form == "determinant" else torch.einsum("bihd,bjhd,bkhd->bhijk", q, k1, k2)
    logits = logits.masked_fill(~(read1[..., :, None] & read2[..., None, :]), -torch.inf)
    return logits.flatten(-2).softmax(-1).view_as(logits)


def determinant(q: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    """Return (B, H, i, j, k): the sum of det[q; k1; k2] over triples of channels, and of plain products of the rest."""
    triples = q.shape[-1] // 3
    whole = [x[..., : 3 * triples].unflatten(-1, (triples, 3)) for x in (q, k1, k2)]
    rest = [x[..., 3 * triples :] for x in (q, k1, k2)]
    cross = torch.linalg.cross(whole[1][:, :, None], whole[2][:, None])  # det[q; k1; k2] = q . (k1 x k2)
    logits = torch.einsum("bihtx,bjkhtx->bhijk", whole[0], cross)
    return logits + torch.einsum("bihd,bjhd,bkhd->bhijk", *rest)


def allowed(tokens: int, window: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Return (B or 1, i, j) bool: i - window < j <= i, within one document."""
    i, j = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)
    inside = ((i - window < j) & (j <= i))[None]
    return inside if documents is None else inside & (documents[:, :, None] == documents[:, None, :])
