"""Mixtures of experts: each token goes to a few of several experts, chosen by a router (arXiv 1701.06538).

No token is ever dropped, so that a row's result does not depend on its batch. Shapes: N tokens, K experts of a token,
E experts, M = N K places, D width of the residual stream, F hidden width.
"""

from torch import Tensor
from torch.nn import functional

from trivium.config import UserError
from trivium.mixers.routing import StackedLinear, Switched
from trivium.model.feedforward import FeedForwardKind, flops_per_token, num_params
from trivium.ops.gelu import gelu


def check_experts(experts: int, top: int) -> None:
    """Raise UserError unless there is an expert, and a mixture sends each token to 1 to all of them."""
    if experts < 1:
        raise UserError(f"experts: {experts} is not allowed; allowed: 1 or more")
    if experts > 1 and not 1 <= top <= experts:
        raise UserError(f"experts_per_token: {top} is not allowed; allowed: 1 to {experts}")


def mixture_params(kind: FeedForwardKind, width: int, ff_width: int, experts: int) -> int:
    """Return the parameters of a mixture: those of every expert, and the router's."""
    return experts * num_params(kind, width, ff_width) + experts * width


def mixture_flops(kind: FeedForwardKind, width: int, ff_width: int, experts: int, top: int) -> int:
    """Return the FLOPs of a token: those of the experts it goes to, and the router's."""
    return top * flops_per_token(kind, width, ff_width) + 2 * experts * width


class ExpertFeedForward(Switched):
    """A mixture of feed-forwards; until it is switched on it computes what its first expert does."""

    def __init__(
        self,
        kind: FeedForwardKind,
        width: int,
        ff_width: int,
        experts: int,
        top: int,
        std: float,
        output_std: float,
        *,
        backend: str = "auto",
        products: str = "auto",
    ):
        super().__init__(width, experts, top, std)
        self.kind, self.backend = kind, backend
        gated = kind == "swiglu"
        self.input = StackedLinear(experts, width, 2 * ff_width if gated else ff_width, not gated, std, products)
        self.output = StackedLinear(experts, ff_width, width, not gated, output_std, products)

    def stacked(self) -> list[StackedLinear]:
        return [self.input, self.output]

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.output.first(self._activate(self.input.first(x)))
        flat_ND = x.flatten(0, -2)
        route = self.route(flat_ND)
        hidden = self._activate(self.input(route.send(flat_ND), route))
        return route.gather(self.output(hidden, route)).view(x.shape)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.kind == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            return functional.silu(gate) * up
        return gelu(hidden, backend=self.backend) if self.kind == "gelu_new" else functional.gelu(hidden)
