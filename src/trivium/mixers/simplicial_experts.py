"""A mixture of 2-simplicial heads: a token's queries come from a few of several experts (arXiv 2507.02754, 2210.05144).

An expert is a set of query heads and their map back into the residual stream; keys and values are shared, so that a
token reads with its own experts what all tokens have written. Shapes: B rows, T tokens, D width, H heads of an expert,
G key/value heads, K head width, S experts of a token, R = H / G, N = B T tokens, M = N S places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trivium.mixers import cache
from trivium.mixers.base import MIXERS, MixerConfig, MixerContext
from trivium.mixers.heads import num_kv_heads
from trivium.mixers.routing import Route, StackedLinear, Switched
from trivium.mixers.simplicial import Simplicial, SimplicialConfig, SimplicialState
from trivium.registry import UserError


@MIXERS.register("simplicial_experts")
@dataclass(frozen=True)
class SimplicialExpertsConfig(SimplicialConfig):
    """2-simplicial attention whose query heads are a mixture of experts over shared keys and values."""

    experts: int = 4
    """Sets of query heads, each with its map into the residual stream."""
    experts_per_token: int = 2
    """Experts that a token's queries come from; none is ever dropped."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(f"experts_per_token: {self.experts_per_token} is not allowed; allowed: 1 to {self.experts}")
        for name in ("rotary", "qk_norm", "pair_bias"):
            if getattr(self, name):
                raise UserError(f"{name}: a mixture of heads does not have it; give false")
        if self.form == "factorized":
            raise UserError("form: a mixture of heads is trilinear or determinant")

    def build(self, context: MixerContext) -> "SimplicialExperts":
        return SimplicialExperts(self, context)

    def _expert_params(self, context: MixerContext) -> int:
        """Return the parameters of one expert's maps."""
        inner = context.heads * context.head_width
        return 2 * context.width * inner + (inner + context.width if self.bias else 0)

    def num_params(self, context: MixerContext) -> int:
        more = (self.experts - 1) * self._expert_params(context)
        return super().num_params(context) + more + self.experts * context.width

    def flops_per_token(self, context: MixerContext, length: int) -> float:
        one = super().flops_per_token(context, length)
        shared = 8 * context.width * num_kv_heads(context, self.kv_heads) * context.head_width
        return shared + self.experts_per_token * (one - shared) + 2 * self.experts * context.width

    def equals_at(self, other: MixerConfig, length: int) -> bool:
        """Say whether both are the same mixture of heads that read the same pairs."""
        if not isinstance(other, SimplicialExpertsConfig):
            return False
        sizes = [(each.experts, each.experts_per_token) for each in (self, other)]
        return sizes[0] == sizes[1] and super().equals_at(other, length)

    @classmethod
    def examples(cls) -> Sequence["SimplicialExpertsConfig"]:
        return [
            cls(),
            cls(window1=5, window2=2, kv_heads=2, bias=True, experts=3),
            cls(window1=6, window2=3, kv_heads=1, form="determinant", experts_per_token=1),
        ]


class HeadExperts(Switched):
    """The experts' query projections and maps back; see SimplicialExpertsConfig."""

    def __init__(self, config: SimplicialExpertsConfig, context: MixerContext):
        std = (3 * context.width) ** -0.5  # that of nn.Linear's own start
        super().__init__(context.width, config.experts, config.experts_per_token, std)
        inner, products = context.heads * context.head_width, context.backend("grouped_product")
        self.query = StackedLinear(config.experts, context.width, inner, config.bias, std, products)
        self.out = StackedLinear(config.experts, inner, context.width, config.bias, std, products)

    def stacked(self) -> list[StackedLinear]:
        return [self.query, self.out]


class SimplicialExperts(Simplicial):
    """See SimplicialExpertsConfig. `qkv` holds the rows of k1, k2, v1 and v2; `experts` has the queries and `out`."""

    config: SimplicialExpertsConfig

    def __init__(self, config: SimplicialExpertsConfig, context: MixerContext):
        super().__init__(config, context)
        shared = 4 * self.kv_heads * self.head_width
        self.qkv = nn.Linear(context.width, shared, bias=config.bias)
        del self._modules["out"]
        self.experts = HeadExperts(config, context)

    @property
    def out(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The experts' map into the residual stream, which has no second name in the state."""
        return self.experts.out

    def forward(
        self,
        x_BTD: Tensor,
        state: SimplicialState | None = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, SimplicialState | None]:
        if state is not None and documents_BT is not None:
            raise ValueError("documents_BT: a state continues one document a row; give documents or a state, not both")
        x_BTD = cache.without_padding(x_BTD, lengths_B)
        k1, k2, v1, v2 = self.qkv(x_BTD).unflatten(-1, (-1, self.head_width)).split(self.kv_heads, dim=2)
        q, route = self._queries(x_BTD)
        if state is None:
            y_BTHK = self._operator(q, k1, k2, v1, v2, documents=documents_BT)
        else:
            y_BTHK, state = self._continue(q, [k1, k2, v1, v2], state, lengths_B)
        return self._back(y_BTHK, route), state

    def _queries(self, x_BTD: Tensor) -> tuple[Tensor, Route | None]:
        """Return q (B, T, S H, K), the heads that share a key head side by side, and where the tokens went."""
        if not self.experts.on:
            return self.experts.query.first(x_BTD).unflatten(-1, (self.heads, self.head_width)), None
        flat_ND = x_BTD.flatten(0, 1)
        route = self.experts.route(flat_ND)
        q_NSX = route.unsort(self.experts.query(route.send(flat_ND), route))
        q_NSGRK = q_NSX.unflatten(-1, (self.kv_heads, -1, self.head_width))
        return q_NSGRK.transpose(1, 2).flatten(1, 3).unflatten(0, x_BTD.shape[:2]), route

    def _back(self, y_BTHK: Tensor, route: Route | None) -> Tensor:
        if route is None:
            return self.experts.out.first(y_BTHK.flatten(2))
        y_NGSRK = y_BTHK.flatten(0, 1).unflatten(1, (self.kv_heads, self.experts.top, -1))
        y_MX = route.sort(y_NGSRK.transpose(1, 2).flatten(2))
        return route.gather(self.experts.out(y_MX, route)).unflatten(0, y_BTHK.shape[:2])
