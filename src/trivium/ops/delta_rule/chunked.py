"""The gated delta rule in chunks, in plain PyTorch (arXiv 2412.06464, section 3.3): one triangular system a chunk.

With n[t] the (scaled) error that token t writes and D[t,j] the sum of log decays after j up to t,
    S[t] = exp(D[t,start]) S[start] + sum_{j<=t} exp(D[t,j]) k[j] n[j]^T
    n[t] = beta[t] (v[t] - k[t] exp(D[t,start]) S[start] - sum_{j<t} exp(D[t,j]) (k[t].k[j]) n[j]),
a lower triangular system with ones on its diagonal whose right-hand side is linear in S[start]. The sums D are added
up as they are, never taken as differences of two large ones, and none is positive: no decay overflows.

Shapes: B rows, T tokens, H heads, G = B H, K key width, V value width, N chunks of C tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trivium.ops.linear_attention.chunked import FEW, by_chunk, by_token, chunk_size
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
    gates = (beta[..., None], forget_between(log_decay, documents)[..., None])
    q, k, v, beta, log_decay = (x.to(state.dtype) for x in (scale * q, k, v, *gates))
    if tokens <= FEW:
        o, state = _one_by_one(q, k, v, beta, log_decay, state)
        return o.to(out_dtype), state
    chunks = (by_chunk(x, chunk_size(tokens, CHUNK)) for x in (q, k, v, beta, log_decay))
    o_NGCV, state_GKV = cast("tuple[Tensor, Tensor]", _Chunks.apply(*chunks, state.flatten(0, 1)))
    return by_token(o_NGCV, state, tokens).to(out_dtype), state_GKV.view_as(state)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, beta_BTH1: Tensor, log_decay_BTH1: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (o, state); the state is read and written as few times as can be."""
    decay_BTH1, outputs = log_decay_BTH1.exp(), []
    for t in range(q.shape[1]):
        decay, key = decay_BTH1[:, t, :, None], k[:, t, :, None, :]
        wrong = torch.addcmul(v[:, t, :, None, :], key @ state, decay, value=-1)
        state = (decay * state).addcmul_(key.mT, beta_BTH1[:, t, :, None] * wrong)
        outputs.append(q[:, t, :, None, :] @ state)
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def between(log_decay_C: Tensor) -> Tensor:
    """Return (..., C, C): exp of the sum of log decays after token j up to token i; 0 for j > i."""
    size = log_decay_C.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay_C.device)
    later = log_decay_C[..., :, None].expand(*log_decay_C.shape, size).masked_fill(~ones.tril(-1), 0)
    return later.cumsum(-2).exp().masked_fill(~ones.tril(), 0)


class _Chunks(torch.autograd.Function):
    """Return (o, state) of q, k, v, beta, log_decay (N, G, C, ...) and a state, with the backward pass written out.

    Strengths and decays multiply the small matrices between tokens, not keys and values. With s the sums of the log
    decays since the chunk's start, the decay from j to i is exp(s[i] - s[j]): times its gradient it is what s[i] gets
    and what is taken from s[j].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta_NGC1: Tensor, log_decay: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        decay_NGCC, since_NGC1 = between(log_decay[..., 0]), log_decay.cumsum(-2).exp()
        keys_NGCC, scores_NGCC = k @ k.mT, (q @ k.mT).mul_(decay_NGCC)
        system_NGCC = keys_NGCC * decay_NGCC * beta_NGC1
        one_CC = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
        inverse_NGCC = torch.linalg.solve_triangular(system_NGCC, one_CC, upper=False, unitriangular=True)
        solved_NGCC = inverse_NGCC * beta_NGC1.mT
        read = (solved_NGCC * since_NGC1.mT) @ k
        until, kept = k * decay_NGCC[..., -1, :, None], since_NGC1[..., -1:, :]
        news = solved_NGCC @ v
        states = state.new_empty(len(q) + 1, *state.shape)
        states[0] = state
        for n in range(len(q)):
            news[n].baddbmm_(read[n], states[n], alpha=-1)
            torch.baddbmm(kept[n] * states[n], until[n].mT, news[n], out=states[n + 1])
        found = (decay_NGCC, since_NGC1, keys_NGCC, scores_NGCC, inverse_NGCC, solved_NGCC)
        found += (read, until, news, states)
        ctx.save_for_backward(q, k, v, beta_NGC1, log_decay, *found)
        o_NGCV = (q @ states[:-1]).mul_(since_NGC1)
        return o_NGCV.add_(scores_NGCC @ news), states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return _gradients(ctx, *gradients)


@once_differentiable
def _gradients(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    q, k, v, beta, log_decay, decay, since, keys, scores, inverse, solved, read, until, news, states = ctx.saved_tensors
    kept = since[..., -1:, :]
    dread, dnews = do * since, scores.mT @ do
    dstates = torch.empty_like(states)
    dstates[-1] = dstate
    torch.matmul(q.mT, dread, out=dstates[:-1])
    for n in reversed(range(len(q))):
        dnews[n].baddbmm_(until[n], dstates[n + 1])
        dstates[n].addcmul_(kept[n], dstates[n + 1]).baddbmm_(read[n].mT, dnews[n], alpha=-1)
    before, after = states[:-1], dstates[1:]
    # Through the states: what is read at their start, and what is written until their end.
    dq, duntil = dread @ before.mT, news @ after.mT
    dsums = (q * dq).sum(-1)
    to_end = (duntil * until).sum(-1)
    dsums -= to_end
    dsums[..., -1] += to_end.sum(-1) + (before * after).sum((-2, -1)) * kept[..., 0, 0]
    dk = duntil.mul_(decay[..., -1, :, None])
    # Through the scores.
    dscores = do @ news.mT
    dpairs = dscores * scores
    dscores *= decay
    dq += dscores @ k
    dk += dscores.mT @ q
    # Through the system's solution, for values and for keys that read the state.
    dv = solved.mT @ dnews
    from_state = -(dnews @ before.mT)
    dk += (solved * since.mT).mT @ from_state
    dsolved = (from_state @ k.mT).mul_(since.mT)
    dsums += (dsolved * solved).sum(-2)
    dsolved += dnews @ v.mT
    dbeta = (dsolved * inverse).sum(-2)
    dsystem = (inverse.mT @ dsolved.mul_(beta.mT) @ inverse.mT).neg_().mul_(decay)
    dbeta += (dsystem * keys).tril(-1).sum(-1)
    dsystem = dsystem.mul_(beta).tril_(-1)
    dpairs.addcmul_(dsystem, keys)
    dk += (dsystem + dsystem.mT) @ k
    dpairs.diagonal(dim1=-2, dim2=-1).zero_()
    dsums += dpairs.sum(-1) - dpairs.sum(-2)
    later = dsums.flip(-1).cumsum(-1).flip(-1)
    dlog_decay = later[..., None] * log_decay.exp().sign()  # 0 where nothing is kept
    return dq, dk, dv, dbeta[..., None], dlog_decay, dstates[0]
