"""Gated linear attention in chunks, in plain PyTorch (arXiv 2312.06635, section 4): matrix products, few steps.

Within a chunk the score of query i and key j is sum_c q[i,c] k[j,c] exp(g[j+1,c] + ... + g[i,c]). It is built by
joining neighbouring blocks of 1, 2, 4, ... tokens: a query of the right block decays from the border, a key of the
left block decays up to it. Decays are only multiplied, never divided by, and none is above 1, so that a decay of any
strength, 0 included, neither overflows nor loses digits.

Shapes: B rows, T tokens, H heads, G = B H, K key width, V value width, N chunks of C tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trivium.ops.recurrence import forget_between

CHUNK = 32
FEW = 4  # tokens that go faster one by one, as in decoding


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (o, state); arguments as in `reference`."""
    tokens, out_dtype = q.shape[1], q.dtype
    q, k, v, log_decay = (x.to(state.dtype) for x in (scale * q, k, v, forget_between(log_decay, documents)))
    if tokens <= FEW:
        o, state = _one_by_one(q, k, v, log_decay.exp(), state)
        return o.to(out_dtype), state
    chunks = (by_chunk(x, chunk_size(tokens, CHUNK)) for x in (q, k, v, log_decay))
    o_NGCV, state_GKV = cast("tuple[Tensor, Tensor]", _Chunks.apply(*chunks, state.flatten(0, 1)))
    return by_token(o_NGCV, state, tokens).to(out_dtype), state_GKV.view_as(state)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return (o, state); the state is read and written as few times as can be."""
    outputs = []
    for t in range(q.shape[1]):
        state = (decay[:, t, :, :, None] * state).addcmul_(k[:, t, :, :, None], v[:, t, :, None, :])
        outputs.append(q[:, t, :, None, :] @ state)
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def chunk_size(tokens: int, largest: int) -> int:
    """Return the smallest power of two that holds `tokens`, at most `largest`."""
    return min(largest, 1 << (tokens - 1).bit_length())


def by_chunk(x_BTHK: Tensor, size: int) -> Tensor:
    """Return (N, G, C, K), filled up with zeros: they write nothing and forget nothing."""
    missing = -x_BTHK.shape[1] % size
    x_BTHK = functional.pad(x_BTHK, (0, 0, 0, 0, 0, missing)) if missing else x_BTHK
    return x_BTHK.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).contiguous().flatten(1, 2)


def by_token(o_NGCV: Tensor, state_BHKV: Tensor, tokens: int) -> Tensor:
    """Undo `by_chunk`."""
    o_NBHCV = o_NGCV.unflatten(1, state_BHKV.shape[:2])
    return o_NBHCV.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens]


class _Chunks(torch.autograd.Function):
    """Return (o, state) of q, k, v, log_decay (N, G, C, ...) and a state; backward, no decay needs a gradient.

    With s the sums of the log decays since the chunk's start, q[i] comes with the factor exp(s[i]) alone, k[j] with
    exp(-s[j]), and the state behind the chunk with exp(s) of its last token. So the gradient of s[t] is
    q[t] dq[t] - k[t] dk[t], a query's own key left out, and the last one's has S dS in addition.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        decay = kept = log_decay.exp()
        since, until = q * decay, k.clone()  # decayed since the start of their block, and until its end
        scores_NGCC = q.new_zeros(*q.shape[:-1], q.shape[-2])
        scores_NGCC.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        joins = []
        for block in _blocks(q):
            right, left = _halves(since, block)[1].clone(), _halves(until, block)[0].clone()
            _below(scores_NGCC, block).copy_(right @ left.mT)
            kept_left, kept_right = _halves(kept, 1)
            _halves(since, block)[1].mul_(kept_left)
            _halves(until, block)[0].mul_(kept_right)
            kept = (kept_left * kept_right).flatten(-3, -2)
            joins += [right, left, kept_left, kept_right]
        states_NGKV = state.new_empty(len(q) + 1, *state.shape)
        states_NGKV[0] = state
        written_NGKV, kept = until.mT @ v, kept.mT
        for n in range(len(q)):
            torch.addcmul(written_NGKV[n], kept[n], states_NGKV[n], out=states_NGKV[n + 1])
        ctx.save_for_backward(q, k, v, decay, kept, since, until, scores_NGCC, states_NGKV, *joins)
        return scores_NGCC @ v + since @ states_NGKV[:-1], states_NGKV[-1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return _gradients(ctx, *gradients)


@once_differentiable
def _gradients(ctx: Any, do_NGCV: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    q, k, v, decay, kept, since, until, scores_NGCC, states_NGKV, *joins = ctx.saved_tensors
    dread_NGKV = since.mT @ do_NGCV
    dstates_NGKV = torch.empty_like(states_NGKV)
    dstates_NGKV[-1] = dstate
    for n in reversed(range(len(q))):
        torch.addcmul(dread_NGKV[n], kept[n], dstates_NGKV[n + 1], out=dstates_NGKV[n])
    dscores_NGCC = do_NGCV @ v.mT
    dv = scores_NGCC.mT @ do_NGCV + until @ dstates_NGKV[1:]
    dsince, duntil = do_NGCV @ states_NGKV[:-1].mT, v @ dstates_NGKV[1:].mT
    for block in reversed(_blocks(q)):
        right, left, kept_left, kept_right = joins[-4:]
        del joins[-4:]
        dbelow = _below(dscores_NGCC, block)
        _halves(dsince, block)[1].mul_(kept_left).add_(_product(dbelow, left))
        _halves(duntil, block)[0].mul_(kept_right).add_(_product(dbelow.mT, right))
    dq, dk = dsince.mul_(decay), duntil
    dsums = (q * dq).addcmul_(k, dk, value=-1)
    dsums[..., -1, :] += (states_NGKV[1:] * dstates_NGKV[1:]).sum(-1)
    later_CC = torch.ones(q.shape[-2], q.shape[-2], dtype=q.dtype, device=q.device).triu()
    ddecay = (later_CC @ dsums).mul_(decay.sign())  # 0 where the decay is
    dsame = dscores_NGCC.diagonal(dim1=-2, dim2=-1)[..., None]
    return dq.addcmul_(dsame, k), dk.addcmul_(dsame, q), dv, ddecay, dstates_NGKV[0]


def _blocks(x_NGCK: Tensor) -> list[int]:
    """Return the sizes of the blocks that are joined in a chunk: 1, 2, 4, ... C / 2."""
    return [1 << level for level in range(x_NGCK.shape[-2].bit_length() - 1)]


def _halves(x_NGCK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the left and the right blocks (N, G, pairs, block, K) of neighbours, as views."""
    left, right = x_NGCK.unflatten(-2, (-1, 2, block)).unbind(-3)
    return left, right


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of many matrices; thousands of tiny ones go faster term by term."""
    if a.shape[-1] > 2:
        return a @ b
    terms = [a[..., :, i, None] * b[..., i, None, :] for i in range(a.shape[-1])]
    return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])


def _below(scores_NGCC: Tensor, block: int) -> Tensor:
    """Return the scores (N, G, pairs, block, block) of right blocks' queries with left blocks' keys, as a view."""
    pairs = scores_NGCC.unflatten(-1, (-1, 2, block)).unflatten(-4, (-1, 2, block))
    return pairs[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
