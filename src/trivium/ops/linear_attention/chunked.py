"""Gated linear attention in chunks, in plain PyTorch (arXiv 2312.06635, section 4): matrix products, few steps.

Within a chunk the score of query i and key j is sum_c q[i,c] k[j,c] exp(g[j+1,c] + ... + g[i,c]). It is built by
joining neighbouring blocks of 1, 2, 4, ... tokens: a query of the right block decays from the border, a key of the
left block decays up to it. Every exponent is a plain sum of log decays: none is a difference of large numbers and none
is positive, so that a decay of any strength, 0 included, neither overflows nor loses digits.

Shapes: B rows, T tokens, H heads, K key width, V value width, N chunks of C tokens.
"""

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trivium.ops.linear_attention.reference import reference
from trivium.ops.recurrence import forget_between

CHUNK = 16
NOTHING_LEFT = -1e30  # a log decay so far below that its exp is 0, and sums of it are finite


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (o, state); arguments as in `reference`."""
    tokens, out_dtype = q.shape[1], q.dtype
    if tokens == 1:
        return reference(q, k, v, log_decay, scale=scale, state=state, documents=documents)
    log_decay = forget_between(log_decay, documents)
    size = chunk_size(tokens, CHUNK)
    q, k, v, log_decay = (by_chunk(x.to(state.dtype), size) for x in (scale * q, k, v, log_decay))
    # A product with 0 must stay 0: the sums below meet the decays as factors of a matrix of zeros and ones.
    log_decay = log_decay.clamp(min=NOTHING_LEFT)
    scores_BHNCC = cast("Tensor", _Scores.apply(q, k, log_decay))
    ones_CC = torch.ones(size, size, dtype=q.dtype, device=q.device)
    since_BHNCK, until_BHNCK = (ones_CC.tril() @ log_decay).exp(), (ones_CC.triu(1) @ log_decay).exp()
    written_BHNKV = (k * until_BHNCK).mT @ v
    kept_BHNK1 = since_BHNCK[..., -1, :, None]
    states = [state]
    for kept, written in zip(kept_BHNK1.unbind(2), written_BHNKV.unbind(2), strict=True):
        states.append(torch.addcmul(written, kept, states[-1]))
    o_BHNCV = scores_BHNCC @ v + (q * since_BHNCK) @ torch.stack(states[:-1], dim=2)
    return by_token(o_BHNCV, tokens).to(out_dtype), states[-1]


def chunk_size(tokens: int, largest: int) -> int:
    """Return the smallest power of two that holds `tokens`, at most `largest`."""
    return min(largest, 1 << (tokens - 1).bit_length())


def by_chunk(x_BTHK: Tensor, size: int) -> Tensor:
    """Return (B, H, N, C, K), filled up with zeros: they write nothing and forget nothing."""
    missing = -x_BTHK.shape[1] % size
    x_BTHK = functional.pad(x_BTHK, (0, 0, 0, 0, 0, missing)) if missing else x_BTHK
    return x_BTHK.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).contiguous()


def by_token(o_BHNCV: Tensor, tokens: int) -> Tensor:
    """Undo `by_chunk`."""
    return o_BHNCV.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]


class _Scores(torch.autograd.Function):
    """Return (B, H, N, C, C), the score of each key up to each query, with a backward pass that writes in place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
        size = q.shape[-2]
        parts_LCC, pairs_LCC = _borders(size, q.dtype, q.device)
        decay_BHNLCK = (parts_LCC.flatten(0, 1) @ log_decay).exp_().unflatten(-2, (-1, size))
        decayed_BHNLCK = torch.empty_like(decay_BHNLCK)
        for level in range(decay_BHNLCK.shape[-3]):
            for side, x in ((1, q), (0, k)):
                factors = (_side(y, level, side) for y in (x, decay_BHNLCK[..., level, :, :]))
                torch.mul(*factors, out=_side(decayed_BHNLCK[..., level, :, :], level, side))
        ctx.save_for_backward(q, k, decay_BHNLCK, decayed_BHNLCK, parts_LCC, pairs_LCC)
        across_BHNCC = (decayed_BHNLCK @ decayed_BHNLCK.mT).mul_(pairs_LCC).sum(-3)
        return across_BHNCC + torch.diag_embed((q * k).sum(-1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(ctx, *gradients)


@once_differentiable
def _gradients(ctx: Any, dscores_BHNCC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, decay_BHNLCK, decayed_BHNLCK, parts_LCC, pairs_LCC = ctx.saved_tensors
    dacross_BHNLCC = dscores_BHNCC[..., None, :, :] * pairs_LCC
    ddecayed_BHNLCK = (dacross_BHNLCC + dacross_BHNLCC.mT) @ decayed_BHNLCK
    dsame_BHNC1 = dscores_BHNCC.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk = dsame_BHNC1 * k, dsame_BHNC1 * q
    for level in range(decay_BHNLCK.shape[-3]):
        for side, dx in ((1, dq), (0, dk)):
            factors = (_side(y[..., level, :, :], level, side) for y in (ddecayed_BHNLCK, decay_BHNLCK))
            _side(dx, level, side).addcmul_(*factors)
    dsums_BHNMK = ddecayed_BHNLCK.mul_(decayed_BHNLCK).flatten(-3, -2)
    return dq, dk, parts_LCC.flatten(0, 1).mT @ dsums_BHNMK


def _side(x_BHNCK: Tensor, level: int, side: int) -> Tensor:
    """Return the view of the tokens left (0) or right (1) of the borders of a level, whose blocks hold 2^level."""
    return x_BHNCK.unflatten(-2, (-1, 2, 1 << level)).select(-3, side)


@lru_cache(maxsize=16)  # on the device: a captured step cannot copy from the host's memory
def _borders(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (L, C, C) whose decays part a token from its border at each level, and the pairs that a border parts.

    A token right of the border decays from there up to itself, one left of it from behind itself to there.
    """
    place_C = torch.arange(size)
    block_LC = place_C >> torch.arange(size.bit_length() - 1)[:, None]
    right_LC1 = (block_LC % 2 == 1)[..., None]
    same_LCC = block_LC[:, :, None] == block_LC[:, None, :]
    paired_LCC = block_LC[:, :, None] // 2 == block_LC[:, None, :] // 2
    since_CC, until_CC = place_C <= place_C[:, None], place_C > place_C[:, None]
    parts_LCC = same_LCC & torch.where(right_LC1, since_CC, until_CC)
    pairs_LCC = paired_LCC & right_LC1 & ~right_LC1.mT
    return parts_LCC.to(device, dtype), pairs_LCC.to(device, dtype)
