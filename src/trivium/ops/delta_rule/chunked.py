"""The gated delta rule in chunks, in plain PyTorch (arXiv 2412.06464, section 3.3): one triangular system a chunk.

With n[t] the (scaled) error that token t writes and D[t,j] the sum of log decays after j up to t,
    S[t] = exp(D[t,start]) S[start] + sum_{j<=t} exp(D[t,j]) k[j] n[j]^T
    n[t] = beta[t] (v[t] - k[t] exp(D[t,start]) S[start] - sum_{j<t} exp(D[t,j]) (k[t].k[j]) n[j]),
a lower triangular system with ones on its diagonal whose right-hand side is linear in S[start]. The sums D are added
up as they are, never taken as differences of two large ones, and none is positive: no decay overflows.

Shapes: B rows, T tokens, H heads, K key width, V value width, N chunks of C tokens.
"""

import torch
from torch import Tensor

from trivium.ops.delta_rule.reference import reference
from trivium.ops.linear_attention.chunked import by_chunk, by_token, chunk_size
from trivium.ops.recurrence import forget_between

CHUNK = 32


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (o, state); arguments as in `reference`."""
    tokens, out_dtype = q.shape[1], q.dtype
    if tokens == 1:
        return reference(q, k, v, beta, log_decay, scale=scale, state=state, documents=documents)
    log_decay = forget_between(log_decay, documents)
    size = chunk_size(tokens, CHUNK)
    wide = (x.to(state.dtype) for x in (scale * q, k, v, beta[..., None], log_decay[..., None]))
    q, k, v, beta, log_decay = (by_chunk(x, size) for x in wide)
    decay_BHNCC = between(log_decay[..., 0])
    since_BHNC1 = log_decay.cumsum(-2).exp()
    beta_k = beta * k
    system_BHNCC = (beta_k @ k.mT) * decay_BHNCC
    identity_CC = torch.eye(size, dtype=q.dtype, device=q.device)
    inverse_BHNCC = torch.linalg.solve_triangular(system_BHNCC, identity_CC, upper=False, unitriangular=True)
    own_BHNCV, read_BHNCK = inverse_BHNCC @ (beta * v), inverse_BHNCC @ (beta_k * since_BHNC1)
    until_BHNKC = (k * decay_BHNCC[..., -1, :, None]).mT
    kept_BHN11 = since_BHNC1[..., -1:, :]
    states, news = [state], []
    chunks = (x.unbind(2) for x in (own_BHNCV, read_BHNCK, until_BHNKC, kept_BHN11))
    for own, read, until, kept in zip(*chunks, strict=True):
        news.append(own - read @ states[-1])
        states.append(kept * states[-1] + until @ news[-1])
    scores_BHNCC = (q @ k.mT) * decay_BHNCC
    o_BHNCV = scores_BHNCC @ torch.stack(news, dim=2) + (q * since_BHNC1) @ torch.stack(states[:-1], dim=2)
    return by_token(o_BHNCV, tokens).to(out_dtype), states[-1]


def between(log_decay_C: Tensor) -> Tensor:
    """Return (..., C, C): exp of the sum of log decays after token j up to token i; 0 for j > i."""
    size = log_decay_C.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay_C.device)
    later = log_decay_C[..., :, None].expand(*log_decay_C.shape, size).masked_fill(~ones.tril(-1), 0)
    return later.cumsum(-2).exp().masked_fill(~ones.tril(), 0)
