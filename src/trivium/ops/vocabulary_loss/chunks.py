"""The loss and its gradients a chunk of rows at a time, as one operator that torch.compile and autograd know.

Shapes: N rows, D width, V symbols, U the symbols padded to whole tiles, M rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

MULTIPLE = 64  # the padded vocabulary's; rows of 16-bit logits then begin at whole 128 bytes
CHUNK_BYTES = 2**31  # of the logits that exist at a time on a GPU
CHUNK_BYTES_CPU = 2**26
CHUNK_ROWS = 64  # a chunk has a multiple of so many


def chunked(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, *, kernel: str) -> Tensor:
    """Return the weighted sum of the losses; see `vocabulary_loss`."""
    wants = torch.is_grad_enabled()
    loss, _, _ = _operator(
        x_ND.contiguous(),
        weight_VD.contiguous(),
        targets_N,
        weights_N.float(),
        kernel,
        wants and x_ND.requires_grad,
        wants and weight_VD.requires_grad,
    )
    return loss


def _compute(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, kernel: str, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients for x and for the weight, empty where they are not wanted.

    They are wide: what the loss is multiplied by afterwards must meet them before they are rounded.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    symbols = len(weight)
    with torch.autocast(x.device.type, enabled=False):
        weight_UD = pad(weight, (0, 0, 0, -symbols % MULTIPLE))
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx: list[Tensor] = []
        dweight_UD = torch.zeros(weight_UD.shape, dtype=wide, device=x.device) if wants_weight else None
        for start in range(0, len(x), _rows(x, len(weight_UD))):
            rows = slice(start, start + _rows(x, len(weight_UD)))
            logits_MU = x[rows] @ weight_UD.T
            function = _by_kernel if kernel == "triton" else _by_torch
            loss += function(logits_MU, targets[rows], weights[rows], symbols, wants_x or wants_weight)
            if wants_x:
                dx.append(_product(logits_MU, weight_UD))
            if dweight_UD is not None:
                dweight_UD += _wide_product(logits_MU.T, x[rows])
        none = torch.empty(0, dtype=wide, device=x.device)
        # An operator's outputs may not share memory, with each other or with what it was given.
        dweight = none if dweight_UD is None else dweight_UD[:symbols]
        dx_ND = (dx[0] if len(dx) == 1 else torch.cat(dx)) if dx else torch.empty_like(x, dtype=wide)
        return loss, dx_ND if wants_x else none.clone(), dweight.contiguous()


def _rows(x: Tensor, padded: int) -> int:
    size = CHUNK_BYTES if x.device.type == "cuda" else CHUNK_BYTES_CPU
    return max(1, size // (padded * x.dtype.itemsize) // CHUNK_ROWS) * CHUNK_ROWS


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 where the operands are narrower: rounded once on a processor, whose narrow products are
    far faster than those of the operands made wide."""
    if a.device.type == "cpu" and a.dtype not in (torch.float32, torch.float64):
        return (a @ b).float()
    return _wide_product(a, b)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, summed and kept in float32 where the operands are narrower."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _by_torch(logits_MU: Tensor, targets_M: Tensor, weights_M: Tensor, symbols: int, gradient: bool) -> Tensor:
    """Return the loss of the rows; with `gradient`, put its gradient in the place of the logits."""
    wide = torch.float64 if logits_MU.dtype == torch.float64 else torch.float32
    logits_MV = logits_MU[:, :symbols].to(wide)
    total_M1 = logits_MV.logsumexp(1, keepdim=True)
    loss = ((total_M1 - logits_MV.gather(1, targets_M[:, None]))[:, 0] * weights_M).sum()
    if gradient:
        slope_MV = (logits_MV - total_M1).exp_()
        slope_MV.scatter_add_(1, targets_M[:, None], slope_MV.new_full((len(targets_M), 1), -1.0))
        logits_MU[:, :symbols] = slope_MV.mul_(weights_M[:, None])
        logits_MU[:, symbols:] = 0
    return loss


def _by_kernel(logits_MU: Tensor, targets_M: Tensor, weights_M: Tensor, symbols: int, gradient: bool) -> Tensor:
    from trivium.ops.vocabulary_loss.kernels import launch

    losses_M = torch.empty(len(logits_MU), dtype=torch.float32, device=logits_MU.device)
    launch(logits_MU, targets_M, weights_M, losses_M, symbols, gradient)
    return losses_M.sum()


_operator = torch.library.custom_op("trivium::vocabulary_loss", _compute, mutates_args=())


@_operator.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, kernel: str, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = torch.empty((), dtype=wide, device=x.device)
    return (
        loss,
        torch.empty(x.shape if wants_x else (0,), dtype=wide, device=x.device),
        torch.empty(weight.shape if wants_weight else (0,), dtype=wide, device=x.device),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dx, dweight = output
    ctx.wants, ctx.dtypes = inputs[5:], (inputs[0].dtype, inputs[1].dtype)
    ctx.save_for_backward(dx, dweight)
    ctx.mark_non_differentiable(dx, dweight)


def _gradients(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    scaled = [
        (each * dloss).to(dtype) if wanted else None
        for each, wanted, dtype in zip((dx, dweight), ctx.wants, ctx.dtypes, strict=True)
    ]
    return *scaled, None, None, None, None, None


_operator.register_autograd(_gradients, setup_context=_setup_context)
