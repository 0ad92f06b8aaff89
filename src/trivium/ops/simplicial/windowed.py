"""2-simplicial attention in plain PyTorch, tile by tile: memory T*(w1+w2+D) plus one bounded tile.

For a fixed query i and a key k of the short window, the joint softmax is ordinary attention of the virtual query
q[i]*k_short[k] over the long window. A tile holds all virtual queries of a few neighbouring i, so that its logits
are one matrix product with the keys that those i can reach; the softmax runs over (k, j) of each i together.
The backward pass computes each tile again.

Shapes: N rows times key/value heads, G query heads of one group, T tokens, D key width, E value width;
t queries of a tile, w short window, L long keys of a tile, R = G*t*w virtual queries.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trivium.ops.simplicial.forms import determinant_as_trilinear_keys, determinant_as_trilinear_query, widen

# Logits of one tile: a few MB stay in a processor's cache; a GPU wants work for all of its cores.
TILE = {"cpu": 2**20, "cuda": 2**25}


def windowed(
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
    out_dtype = q.dtype
    q, k1, k2, v1 = widen(q, k1, k2, v1)
    rows_NT = None if documents is None else documents.repeat_interleave(k1.shape[2], dim=0)
    if v2 is None:
        keys = [(_by_head(k1), min(window1, q.shape[1])), (_by_head(k2), min(window2, q.shape[1]))]
        o_NGTD = _factorized(_by_group(q, k1.shape[2]), keys, _by_head(v1), rows_NT, scale)
    else:
        (v2,) = widen(v2)
        if bias is not None:
            k2, v2 = k2 + bias[0], v2 + bias[1]
        if form == "determinant":
            q, (k1, k2) = determinant_as_trilinear_query(q), determinant_as_trilinear_keys(k1, k2)
        if window1 < window2:  # In the trilinear form swapping the pairs is exact.
            window1, window2, k1, k2, v1, v2 = window2, window1, k2, k1, v2, v1
        o_NGTD = _Trilinear.apply(
            _by_group(q, k1.shape[2]),
            _by_head(k1),
            _by_head(v1),
            _by_head(k2),
            _by_head(v2),
            rows_NT,
            min(window1, q.shape[1]),
            min(window2, q.shape[1]),
            scale,
        )
    batch, tokens, heads = q.shape[:3]
    return o_NGTD.view(batch, heads, tokens, -1).transpose(1, 2).to(out_dtype)


def _by_head(x_BTGD: Tensor) -> Tensor:
    return x_BTGD.transpose(1, 2).flatten(0, 1).contiguous()


def _by_group(q_BTHD: Tensor, kv_heads: int) -> Tensor:
    batch, tokens, heads, width = q_BTHD.shape
    return q_BTHD.transpose(1, 2).reshape(batch * kv_heads, heads // kv_heads, tokens, width)


class _Tile(NamedTuple):
    """Rows and queries of one tile, the first long key that they can reach, and what each may read (n, 1, t, w, L)."""

    rows: slice
    queries: slice
    keys: slice
    allowed: Tensor


def _tiles(q_NGTD: Tensor, rows_NT: Tensor | None, long: int, short: int) -> Iterator[_Tile]:
    rows, groups, tokens, _ = q_NGTD.shape
    budget = TILE.get(q_NGTD.device.type, TILE["cuda"])
    step = max(8, min(64, long // 4))
    while step > 1 and groups * step * short * (step + long - 1) > budget:
        step //= 2
    step = min(step, tokens)
    chunk = max(1, budget // (groups * step * short * min(step + long - 1, tokens)))
    masks: dict[tuple[int, ...], Tensor] = {}
    for first in range(0, tokens, step):
        queries = slice(first, min(first + step, tokens))
        keys = slice(max(0, first - long + 1), queries.stop)
        # Away from the beginning all tiles read alike.
        shape = (queries.stop - first, first - keys.start, min(first, short - 1))
        if shape not in masks:
            masks[shape] = _reach(*shape, long, short, q_NGTD.device)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            allowed = masks[shape] if rows_NT is None else masks[shape] & _together(rows_NT[part], queries, keys, short)
            yield _Tile(part, queries, keys, allowed)


def _reach(step: int, past: int, past_short: int, long: int, short: int, device: torch.device) -> Tensor:
    """Return (1, 1, t, w, L) bool for queries with `past` long and `past_short` short keys before the tile."""
    query_t = torch.arange(step, device=device)[:, None]
    age_tL = query_t + past - torch.arange(past + step, device=device)
    short_tw = query_t + past_short - (short - 1) + torch.arange(short, device=device) >= 0
    return (((age_tL >= 0) & (age_tL < long))[:, None, :] & short_tw[:, :, None])[None, None]


def _together(rows_NT: Tensor, queries: slice, keys: slice, short: int) -> Tensor:
    """Return (n, 1, t, w, L) bool: both keys are of the query's document."""
    own_nt1 = rows_NT[:, queries, None]
    long_ntL = own_nt1 == rows_NT[:, None, keys]
    short_ntw = own_nt1 == _trailing(rows_NT, short)[:, queries]
    return (long_ntL[:, :, None, :] & short_ntw[:, :, :, None])[:, None]


def _trailing(x_NT: Tensor, window: int) -> Tensor:
    """Return (N, T, ..., w) the last w entries up to each time, as a view of a copy padded in front with zeros."""
    padded = torch.cat((x_NT.new_zeros(x_NT.shape[0], window - 1, *x_NT.shape[2:]), x_NT), dim=1)
    return padded.unfold(1, window, 1)


def _virtual(q_nGtD: Tensor, short_ntwD: Tensor) -> Tensor:
    """Return (n, R, D) the products of each query with each key of its short window."""
    return (q_nGtD[:, :, :, None] * short_ntwD[:, None]).flatten(1, 3)


def _weights(u_nRD: Tensor, long_nLD: Tensor, groups: int, allowed: Tensor) -> Tensor:
    """Return (n, G, t, w*L) the softmax over both keys of each query."""
    logits_nRL = torch.bmm(u_nRD, long_nLD.transpose(1, 2))
    _, _, step, short, keys = allowed.shape
    logits = logits_nRL.view(-1, groups, step, short, keys).masked_fill_(~allowed, -torch.inf)
    return logits.flatten(-2).softmax(-1)


class _Trilinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NGTD: Tensor,
        k_long_NTD: Tensor,
        v_long_NTE: Tensor,
        k_short_NTD: Tensor,
        v_short_NTE: Tensor,
        rows_NT: Tensor | None,
        long: int,
        short: int,
        scale: float,
    ) -> Tensor:
        groups = q_NGTD.shape[1]
        o_NGTE = q_NGTD.new_empty(*q_NGTD.shape[:3], v_long_NTE.shape[-1])
        k_trail, v_trail = (_trailing(x, short).transpose(2, 3) for x in (k_short_NTD * scale, v_short_NTE))
        for rows, queries, keys, allowed in _tiles(q_NGTD, rows_NT, long, short):
            u_nRD = _virtual(q_NGTD[rows, :, queries], k_trail[rows, queries])
            weights = _weights(u_nRD, k_long_NTD[rows, keys], groups, allowed)
            read_nRE = torch.bmm(weights.view(*u_nRD.shape[:2], -1), v_long_NTE[rows, keys])
            read = read_nRE.view(*weights.shape[:3], short, -1)
            o_NGTE[rows, :, queries] = (read * v_trail[rows, queries][:, None]).sum(3)
        ctx.save_for_backward(q_NGTD, k_long_NTD, v_long_NTE, k_short_NTD, v_short_NTE, rows_NT, o_NGTE)
        ctx.long, ctx.short, ctx.scale = long, short, scale
        return o_NGTE

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            return _gradients(ctx, *grad_outputs)


@once_differentiable
def _gradients(ctx: Any, do_NGTE: Tensor) -> tuple[Tensor | None, ...]:
    q_NGTD, k_long_NTD, v_long_NTE, k_short_NTD, v_short_NTE, rows_NT, o_NGTE = ctx.saved_tensors
    long, short, scale = ctx.long, ctx.short, ctx.scale
    groups, tokens = q_NGTD.shape[1:3]
    k_trail, v_trail = (_trailing(x, short).transpose(2, 3) for x in (k_short_NTD * scale, v_short_NTE))
    dq_NGTD = torch.empty_like(q_NGTD)
    dk_long_NTD, dv_long_NTE = torch.zeros_like(k_long_NTD), torch.zeros_like(v_long_NTE)
    dk_short, dv_short = (x.new_zeros(x.shape[0], tokens + short - 1, x.shape[2]) for x in (k_short_NTD, v_short_NTE))
    delta_NGT1 = (do_NGTE * o_NGTE).sum(-1, keepdim=True)
    for rows, queries, keys, allowed in _tiles(q_NGTD, rows_NT, long, short):
        q, do = q_NGTD[rows, :, queries], do_NGTE[rows, :, queries]
        k_tail, v_tail = k_trail[rows, queries], v_trail[rows, queries]
        u_nRD, dread_nRE = _virtual(q, k_tail), _virtual(do, v_tail)
        weights = _weights(u_nRD, k_long_NTD[rows, keys], groups, allowed)
        weights_nRL = weights.view(*u_nRD.shape[:2], -1)
        read_nRE = torch.bmm(weights_nRL, v_long_NTE[rows, keys])
        dv_long_NTE[rows, keys] += torch.bmm(weights_nRL.transpose(1, 2), dread_nRE)
        dlogits_nRL = torch.bmm(dread_nRE, v_long_NTE[rows, keys].transpose(1, 2))
        dlogits_nRL.view_as(weights).sub_(delta_NGT1[rows, :, queries]).mul_(weights)
        dk_long_NTD[rows, keys] += torch.bmm(dlogits_nRL.transpose(1, 2), u_nRD)
        du = torch.bmm(dlogits_nRL, k_long_NTD[rows, keys]).view(*weights.shape[:3], short, -1)
        dq_NGTD[rows, :, queries] = (du * k_tail[:, None]).sum(3)
        dk_tail = _over_group(du * q[:, :, :, None])
        dv_tail = _over_group(read_nRE.view(*weights.shape[:3], short, -1) * do[:, :, :, None])
        for offset in range(short):
            place = slice(queries.start + offset, queries.stop + offset)
            dk_short[rows, place] += dk_tail[:, :, offset]
            dv_short[rows, place] += dv_tail[:, :, offset]
    dk_short_NTD = dk_short[:, short - 1 :] * scale
    return dq_NGTD, dk_long_NTD, dv_long_NTE, dk_short_NTD, dv_short[:, short - 1 :], None, None, None, None


def _over_group(x_nGtwD: Tensor) -> Tensor:
    return x_nGtwD.squeeze(1) if x_nGtwD.shape[1] == 1 else x_nGtwD.sum(1)


def _factorized(
    q_NGTD: Tensor,
    keys_and_windows: list[tuple[Tensor, int]],
    v_NTE: Tensor,
    rows_NT: Tensor | None,
    scale: float,
) -> Tensor:
    """Return (N, G, T, E): two softmaxes over their own windows, multiplied. Its graph keeps T*(w1+w2) weights."""
    tokens, step = q_NGTD.shape[2], 64
    parts = []
    for first in range(0, tokens, step):
        queries = slice(first, min(first + step, tokens))
        products: list[Tensor] = []
        begins: list[int] = []
        for key_NTD, window in keys_and_windows:
            keys = slice(max(0, first - window + 1), queries.stop)
            begins.append(keys.start)
            allowed = _reach(queries.stop - first, first - keys.start, 0, window, 1, q_NGTD.device)
            if rows_NT is not None:
                allowed = allowed & _together(rows_NT, queries, keys, 1)
            logits = scale * torch.matmul(q_NGTD[:, :, queries], key_NTD[:, None, keys].transpose(-1, -2))
            products.append(logits.masked_fill(~allowed[:, :, :, 0], -torch.inf).softmax(-1))
        start = max(begins)
        weights = products[0][..., start - begins[0] :] * products[1][..., start - begins[1] :]
        parts.append(torch.matmul(weights, v_NTE[:, None, start : queries.stop]))
    return torch.cat(parts, dim=2)
