"""Gated linear attention in chunks, in plain PyTorch (arXiv 2312.06635, section 4): matrix products, few steps.

Within a chunk the score of query i and key j is sum_c q[i,c] k[j,c] exp(g[j+1,c] + ... + g[i,c]). It is built by
joining neighbouring blocks of 1, 2, 4, ... tokens: a query of the right block decays from the border, a key of the
left block decays up to it. Every exponent is a plain sum of log decays: none is a difference of large numbers and none
is positive, so that a decay of any strength, 0 included, neither overflows nor loses digits.

Shapes: B rows, T tokens, H heads, K key width, V value width, N chunks of C tokens.
"""

from functools import lru_cache

import torch
from torch import Tensor
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
    sums = _sums(size).to(log_decay).flatten(0, 1) @ log_decay
    decay = sums.exp().unflatten(-2, (-1, size))
    scores_BHNCC = _scores(q, k, decay[..., :-2, :, :])
    since_BHNCK, until_BHNCK = decay[..., -2:, :, :].unbind(-3)
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


def _scores(q: Tensor, k: Tensor, joining_BHNLCK: Tensor) -> Tensor:
    """Return (B, H, N, C, C) each query's score of each key up to it, from the decays of every level of joining."""
    right_LC1, pairs_LCC = (mask.to(q.device) for mask in _borders(q.shape[-2]))
    decayed_BHNLCK = joining_BHNLCK * torch.where(right_LC1, q[..., None, :, :], k[..., None, :, :])
    across_BHNCC = ((decayed_BHNLCK @ decayed_BHNLCK.mT) * pairs_LCC).sum(-3)
    return across_BHNCC + torch.diag_embed((q * k).sum(-1))


@lru_cache(maxsize=16)
def _borders(size: int) -> tuple[Tensor, Tensor]:
    """Return (L, C, 1) which tokens lie right of a border at each level, and (L, C, C) the pairs that it parts."""
    place_C = torch.arange(size)
    level_L1 = torch.arange(size.bit_length() - 1)[:, None]
    right_LC = (place_C >> level_L1) % 2 == 1
    block_LC = place_C >> (level_L1 + 1)
    together_LCC = block_LC[:, :, None] == block_LC[:, None, :]
    return right_LC[..., None], together_LCC & right_LC[:, :, None] & ~right_LC[:, None, :]


@lru_cache(maxsize=16)
def _sums(size: int) -> Tensor:
    """Return (L + 2, C, C) which tokens' decays part each token from the border of each level.

    A token right of the border decays from there up to itself, one left of it from behind itself to there. The last
    two rows hold the decay since the chunk's beginning and until its end.
    """
    place_C = torch.arange(size)
    since_CC, until_CC = place_C <= place_C[:, None], place_C > place_C[:, None]
    half_LC = place_C >> torch.arange(size.bit_length() - 1)[:, None]
    same_LCC = half_LC[:, :, None] == half_LC[:, None, :]
    right_LC1, _ = _borders(size)
    return torch.cat((same_LCC & torch.where(right_LC1, since_CC, until_CC), torch.stack((since_CC, until_CC))))
