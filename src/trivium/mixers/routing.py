"""Routing of tokens to experts: what mixtures of feed-forwards and of heads share (arXiv 1701.06538, 2101.03961).

Shapes: N tokens, K experts of a token, E experts, M = N K places sorted by expert, D width, I and O widths in and out.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trivium.ops.grouped_product import count_flops, grouped_product


class Route(NamedTuple):
    """Where tokens go: `gates_NK` weigh the experts of each, and `order_M` sorts its places by expert."""

    gates_NK: Tensor
    expert_M: Tensor
    order_M: Tensor
    counts_E: Tensor

    def send(self, x_ND: Tensor) -> Tensor:
        """Return (M, D): each token once for each of its experts, sorted by expert."""
        return x_ND.index_select(0, self.order_M // self.gates_NK.shape[1])

    def sort(self, x_NKD: Tensor) -> Tensor:
        """Return (M, D) of what is already apart for each place of a token."""
        return x_NKD.flatten(0, 1).index_select(0, self.order_M)

    def unsort(self, y_MD: Tensor) -> Tensor:
        """Return (N, K, D), by token again."""
        back_M = torch.empty_like(self.order_M).scatter_(
            0, self.order_M, torch.arange(len(self.order_M), device=self.order_M.device)
        )
        return y_MD.index_select(0, back_M).view(*self.gates_NK.shape, -1)

    def gather(self, y_MD: Tensor) -> Tensor:
        """Return (N, D): the experts' results of each token, weighed by its gates."""
        y_NKD = self.unsort(y_MD)
        return (y_NKD * self.gates_NK[..., None].to(y_NKD.dtype)).sum(1)


class StackedLinear(nn.Module):
    """A linear map for each expert: `weight` is (E, O, I), `bias` (E, O) or None, each expert's as in nn.Linear."""

    def __init__(self, experts: int, inner: int, outer: int, bias: bool, std: float, backend: str):
        super().__init__()
        count_flops()
        self.backend = backend
        # All experts begin alike: what they learn tells them apart, and a mixture can be switched on without a jolt.
        weight = torch.empty(outer, inner).normal_(std=std)
        self.weight = nn.Parameter(weight.repeat(experts, 1, 1))
        self.bias = nn.Parameter(torch.zeros(experts, outer)) if bias else None

    def forward(self, x_MI: Tensor, route: Route) -> Tensor:
        """Return (M, O): each place by its own expert."""
        y_MO = grouped_product(x_MI, self.weight, route.counts_E, backend=self.backend)
        return y_MO if self.bias is None else y_MO + self.bias.index_select(0, route.expert_M).to(y_MO.dtype)

    def first(self, x: Tensor) -> Tensor:
        """Return what the first expert makes of x (..., I)."""
        return linear(x, self.weight[0], None if self.bias is None else self.bias[0])


class Switched(nn.Module):
    """A mixture that can be off, and then is its first expert alone.

    Switching it on copies the first expert into all, with what an optimizer knows of it. The gates of a token sum to 1,
    so that this changes nothing that is computed. `load_E` counts, on the device, the places that went to each expert
    in training until someone sets it to zero. `penalty` is the balancing loss of the last forward pass under grad: E
    times the sum over experts of the share of places and the mean probability, 1 when even (arXiv 2101.03961).
    """

    load_E: Tensor

    def __init__(self, width: int, experts: int, top: int, std: float):
        super().__init__()
        self.experts, self.top = experts, top
        self.on = True
        self.router = nn.Linear(width, experts, bias=False)
        nn.init.normal_(self.router.weight, std=std)
        self.penalty: Tensor | None = None
        self.register_buffer("load_E", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def stacked(self) -> list[StackedLinear]:
        """Return the maps that each expert has of its own."""
        raise NotImplementedError

    def route(self, x_ND: Tensor) -> Route:
        """Return where each token goes; under grad in training, count it and keep the penalty."""
        wide = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = linear(wide, self.router.weight.to(wide.dtype))
            top_NK, chosen_NK = logits_NE.topk(self.top, dim=-1)
            gates_NK = top_NK.softmax(-1)
            probability_NE = logits_NE.softmax(-1)
            if self.top == 1:  # a gate of 1 with the gradient of the probability
                p_N1 = probability_NE.gather(-1, chosen_NK)
                gates_NK = p_N1 / p_N1.detach()
        expert_M = chosen_NK.flatten()
        places_ME = expert_M[:, None] == torch.arange(self.experts, device=expert_M.device)
        counts_E = places_ME.sum(0)
        order_M = expert_M.argsort(stable=True)
        if self.training and torch.is_grad_enabled():
            share_E = counts_E / max(len(expert_M), 1)
            self.penalty = self.experts * (share_E * probability_NE.mean(0)).sum()
            self.load_E += counts_E
        return Route(gates_NK, expert_M.index_select(0, order_M), order_M, counts_E)

    @torch.no_grad()
    def spread(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Copy the first expert into all others, and its moments in `optimizer` too."""
        for parameter in (each for stack in self.stacked() for each in stack.parameters()):
            parameter[1:] = parameter[:1]
            for value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[1:] = value[:1]
