"""The Triton kernel of `take_greedy`: a program has some rows and all their symbols."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium.ops.simplicial.triton_support import interpreted

_TILE = 1024  # logits of a program


@triton.jit
def _take_kernel(
    logits, tokens, place, budgets, done, fed, added, rows, symbols, columns, end, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    r, v = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BV)
    inside, row = r < rows, r.to(tl.int64)
    wanted = inside[:, None] & (v < symbols)[None, :]
    x = tl.load(logits + row[:, None] * symbols + v[None, :], mask=wanted, other=float("-inf")).to(tl.float32)
    chosen = tl.argmax(x, 1).to(tl.int64)
    at = tl.load(place + r, mask=inside, other=0)
    before = tl.load(done + r, mask=inside, other=0) != 0
    goes_on = inside & (before == 0)
    tl.store(tokens + row * columns + at, chosen, mask=goes_on & (at < columns))
    ended = before | (chosen == end) | (tl.load(budgets + r, mask=inside, other=0) <= at + 1)
    tl.store(place + r, at + 1, mask=goes_on)
    tl.store(done + r, ended.to(tl.uint8), mask=inside)
    tl.store(fed + r, chosen, mask=inside)
    tl.store(added + r, 1 - ended.to(tl.int64), mask=inside)


_kernel: Any = _take_kernel


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _launch(
    logits: Tensor, tokens: Tensor, place: Tensor, budgets: Tensor, done: Tensor, fed: Tensor, added: Tensor, end: int
) -> None:
    rows, symbols = logits.shape
    if not rows:
        return
    wide = _power_of_two(symbols)
    block = max(1, min(_TILE // wide, _power_of_two(rows)))
    _kernel[(-(-rows // block),)](
        *(logits, tokens, place, budgets, done.view(torch.uint8), fed, added),
        *(rows, symbols, tokens.shape[1], end),
        BR=block,
        BV=wide,
        num_warps=4,
    )


_operator = torch.library.custom_op(
    "trivium::take_greedy", _launch, mutates_args=("tokens", "place", "done", "fed", "added")
)


def by_triton(
    logits_BV: Tensor,
    tokens_BN: Tensor,
    place_B: Tensor,
    budgets_B: Tensor,
    done_B: Tensor,
    fed_B: Tensor,
    added_B: Tensor,
    end_id: int,
) -> None:
    """Do what `take_greedy` says."""
    if logits_BV.device.type == "cpu" and not interpreted():
        raise ValueError("logits: on cpu; backend triton needs tensors on a GPU")
    kept = tokens_BN, place_B, budgets_B, done_B, fed_B, added_B
    if not all(each.is_contiguous() for each in kept):
        raise ValueError("tokens, places, budgets and the like: backend triton needs contiguous tensors")
    _operator(logits_BV.contiguous(), *kept, end_id)
