"""Make operators of functions that launch kernels: torch.compile and autograd know them, eager calls go straight on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """An operator `trivium::name` of the function `run`; `op` is what torch.library knows.

    `fake` returns empty outputs. `gradients(ctx, *of_outputs)` and `remember(ctx, inputs, output)` are autograd's, for
    outputs that have gradients. A registered operator costs its caller 30 us, and 100 us with gradients, as long as
    these kernels run at small shapes: so a call with plain tensors outside of compiling goes to `run` itself.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        gradients: Callable[..., Any] | None = None,
        remember: Callable[..., None] | None = None,
    ):
        self._run = run
        self.op = torch.library.custom_op(f"trivium::{name}", run, mutates_args=())
        self.op.register_fake(fake)
        self._function: Any = None
        if gradients is not None and remember is not None:
            self.op.register_autograd(gradients, setup_context=remember)
            members = {"forward": run, "setup_context": remember, "backward": once_differentiable(gradients)}
            self._function = type(name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()})

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return self.op(*inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not all(type(x) in PLAIN for x in tensors):
            return self.op(*inputs)
        if self._function is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self._function.apply(*inputs)
        return self._run(*inputs)


def attention_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return empty o (B, T, H, D) and log-sum-exp (B, H, T) in float32."""
    rows, tokens, heads, _ = q.shape
    return output_fake(q), torch.empty(rows, heads, tokens, dtype=torch.float32, device=q.device)


def gradients_fake(do: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Return empty gradients of q and of the keys and values."""
    return tuple(output_fake(x) for x in inputs[:5])


def output_fake(q: Tensor, *rest: Any) -> Tensor:
    """Return an empty, contiguous tensor of q's shape."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the six tensors that an attention's inputs begin with, its output, and the numbers after them."""
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)


def biased(k2: Tensor, v2: Tensor, bias: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return k2 and v2 with the bias: a pass over tensors without query heads, whose gradients give the bias's."""
    if bias is None:
        return k2, v2
    return (k2 + bias[0]).to(k2.dtype), (v2 + bias[1]).to(v2.dtype)


def check_rows(backend: str, **tensors: Tensor) -> None:
    """Raise ValueError for a tensor whose head width is not contiguous."""
    for name, tensor in tensors.items():
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ValueError(
                f"{name}: stride {tensor.stride(3)} of the head width; "
                f"backend {backend} needs 1: give {name}.contiguous()"
            )
