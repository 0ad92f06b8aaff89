"""The position-wise half of a block. Shapes: (..., D) in and out, F the hidden width."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from trivium.ops.feedforward import feedforward
from trivium.ops.fused_linear import norm_feedforward
from trivium.ops.linear import Linear

FeedForwardKind = Literal["gelu", "gelu_new", "swiglu"]


def default_width(kind: FeedForwardKind, width: int) -> int:
    """Return the usual hidden width: 4 D, or 8/3 D for swiglu, whose three matrices then weigh the same."""
    return round(8 * width / 3) if kind == "swiglu" else 4 * width


def num_params(kind: FeedForwardKind, width: int, ff_width: int) -> int:
    """Return the parameters of a FeedForward: biases with GELU as in GPT-2, none with SwiGLU."""
    if kind == "swiglu":
        return 3 * width * ff_width
    return 2 * width * ff_width + ff_width + width


def flops_per_token(kind: FeedForwardKind, width: int, ff_width: int) -> int:
    """Return the FLOPs of the matrix products, forward, 2 for a multiply-add."""
    return 2 * (3 if kind == "swiglu" else 2) * width * ff_width


class FeedForward(nn.Module):
    """Two linear maps around GELU (exact, or "gelu_new", GPT-2's tanh form), or SwiGLU (arXiv 2002.05202).

    `std` and `output_std` are the standard deviations that the two maps start with, `backends` those of the operators
    feedforward, gelu and linear, and of norm_feedforward, norm_linear and linear_add where no gradient is wanted on a
    GPU.
    """

    def __init__(
        self,
        kind: FeedForwardKind,
        width: int,
        ff_width: int,
        std: float,
        output_std: float,
        backends: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.kind: FeedForwardKind = kind
        chosen = backends or {}
        products = chosen.get("linear", "auto")
        self.backends = {
            "backend": chosen.get("feedforward", "auto"),
            "gelu_backend": chosen.get("gelu", "auto"),
            "linear_backend": products,
        }
        self.whole_backend = chosen.get("norm_feedforward", "auto")
        self.part_backends = chosen.get("norm_linear", "auto"), chosen.get("linear_add", "auto")
        gated = kind == "swiglu"
        self.input = Linear(width, 2 * ff_width if gated else ff_width, bias=not gated, backend=products)
        self.output = Linear(ff_width, width, bias=not gated, backend=products)
        for linear, linear_std in ((self.input, std), (self.output, output_std)):
            nn.init.normal_(linear.weight, std=linear_std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, stream: Tensor | None = None) -> Tensor:
        """Return what the maps make of x, added to the residual stream where one is given."""
        if self.kind == "gelu_new":
            maps = self.input.weight, self.input.bias, self.output.weight, self.output.bias
            return feedforward(x, *maps, stream=stream, **self.backends)
        hidden = self.input(x)
        if self.kind == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            y = self.output(functional.silu(gate) * up)
        else:
            y = self.output(functional.gelu(hidden))
        return y if stream is None else stream + y

    def add_to(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Return x + self(norm(x)), without gradients."""
        if self.kind == "swiglu" or set(self.backends.values()) != {"auto"}:
            return x + self(norm(x))
        maps = self.input.weight, self.input.bias, self.output.weight, self.output.bias
        return norm_feedforward(x, norm, *maps, self.kind, backend=self.whole_backend, parts=self.part_backends)
