"""The Triton kernel of the loss: one program reads a row of logits and leaves its gradient in their place."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # symbols that a program reads at a time


@triton.jit
def loss_kernel(
    logits, targets, weights, losses, symbols, padded, stride,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weighted loss of one row, and with GRADIENT its slope, 0 beyond the symbols, over the logits."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    c = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, symbols, BLOCK):
        x = tl.load(line + start + c, mask=start + c < symbols, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        # Lanes that have seen no symbol stay at minus infinity, whose difference to itself is no number.
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = larger
    top = tl.max(largest, 0)
    whole = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    target = tl.load(targets + row)
    weight = tl.load(weights + row)
    tl.store(losses + row, (whole - tl.load(line + target).to(tl.float32)) * weight)
    if GRADIENT:
        tl.debug_barrier()  # all have read the target's logit before anyone writes over it
        for start in range(0, padded, BLOCK):
            x = tl.load(line + start + c, mask=start + c < symbols, other=float("-inf")).to(tl.float32)
            slope = (tl.exp(x - whole) - tl.where(start + c == target, 1.0, 0.0)) * weight
            tl.store(line + start + c, slope.to(logits.dtype.element_ty), mask=start + c < padded)


_kernel: Any = loss_kernel


def launch(
    logits_MU: Tensor, targets_M: Tensor, weights_M: Tensor, losses_M: Tensor, symbols: int, gradient: bool
) -> None:
    """Write the losses of the rows, and with `gradient` their slopes over the logits."""
    if not len(logits_MU):
        return
    block = min(BLOCK, triton.next_power_of_2(logits_MU.shape[1]))
    assert logits_MU.stride(1) == 1
    _kernel[(len(logits_MU),)](
        *(logits_MU, targets_M.to(torch.int64).contiguous(), weights_M.contiguous(), losses_M),
        symbols,
        logits_MU.shape[1],
        logits_MU.stride(0),
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=16 if block >= 4096 else 4,
    )
