"""What a block of any model is made of: norms, a mixer, a feed-forward, and how their weights start.

Shapes: B rows, T tokens, D width of the residual stream.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.nn import functional

from trivium.config import UserError
from trivium.mixers.base import Mixer, MixerConfig, MixerContext
from trivium.model import feedforward
from trivium.model.alike import Alike
from trivium.model.experts import ExpertFeedForward
from trivium.model.feedforward import FeedForward, FeedForwardKind
from trivium.ops import dispatch
from trivium.ops.add_norm import add_norm
from trivium.ops.fused_linear import is_fused
from trivium.registry import nearest

Norm = Literal["layernorm", "rmsnorm"]


class BlockConfig(Protocol):
    """What a model's config tells its blocks."""

    @property
    def width(self) -> int: ...
    @property
    def norm(self) -> Norm: ...
    @property
    def feedforward(self) -> FeedForwardKind: ...
    @property
    def hidden_width(self) -> int: ...
    @property
    def dropout(self) -> float: ...


def initial_std(width: int) -> float:
    """Return the standard deviation that weights start with: GPT-2's 0.02 at width 768; narrower layers need more for
    their sums to be as large.
    """
    return 0.02 * math.sqrt(768 / width)


def output_shrink(layers: int) -> float:
    """Return what scales down the weights that add to the residual stream, so that depth doesn't change its size."""
    return 1 / math.sqrt(2 * layers)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, by operator add_norm with the `backend` given."""

    def __init__(self, width: int, backend: str):
        super().__init__(width, eps=1e-5)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return self.of_sum(input, None)[1]

    def of_sum(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + y, or x without y, and its norm."""
        return add_norm(x, y, self.weight, self.bias, epsilon=self.eps, backend=self.backend)


class RMSNorm(nn.RMSNorm):
    """PyTorch's."""

    def of_sum(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + y, or x without y, and its norm."""
        x = x if y is None else x + y
        return x, self(x)


def make_norm(kind: Norm, width: int, backend: str = "auto") -> LayerNorm | RMSNorm:
    """Return a new norm over the width; `backend` is that of operator add_norm."""
    return LayerNorm(width, backend) if kind == "layernorm" else RMSNorm(width, eps=1e-5)


def norm_params(kind: Norm, width: int) -> int:
    """Return the parameters of one norm."""
    return width * (2 if kind == "layernorm" else 1)


def block_params(config: BlockConfig) -> int:
    """Return the parameters of a block, its mixer's left out."""
    ff = feedforward.num_params(config.feedforward, config.width, config.hidden_width)
    return 2 * norm_params(config.norm, config.width) + ff


class Block(nn.Module):
    """Norm, mixer, norm, feed-forward; each half adds to the residual stream."""

    def __init__(
        self,
        config: BlockConfig,
        mixer: Mixer,
        std: float,
        output_std: float,
        backends: Mapping[str, str],
        mixture: tuple[int, int] | None = None,
    ):
        super().__init__()
        norms = backends.get("add_norm", "auto")
        self.norm1 = make_norm(config.norm, config.width, norms)
        self.mixer = mixer
        self.norm2 = make_norm(config.norm, config.width, norms)
        sizes: tuple[FeedForwardKind, int, int] = (config.feedforward, config.width, config.hidden_width)
        if mixture is None:
            self.feedforward = FeedForward(*sizes, std, output_std, backends)
        else:
            gelu, products = backends.get("gelu", "auto"), backends.get("grouped_product", "auto")
            self.feedforward = ExpertFeedForward(*sizes, *mixture, std, output_std, backend=gelu, products=products)
        self.dropout = config.dropout

    def forward(
        self,
        x_BTD: Tensor,
        state: Any,
        lengths_B: Tensor | None,
        documents_BT: Tensor | None,
        positions_BT: Tensor | None,
        keep: int | None = None,
        wanted_N: Tensor | None = None,
        alike: Alike | None = None,
    ) -> tuple[Tensor, Any]:
        """Return (x_BTD, state); of the last `keep` tokens alone, if it is given.

        With `wanted_N`, places in the flattened B*T, what no other place reads is computed for those alone, and
        (x_ND, state) comes back. `alike`, for the parallel form of whole rows, says which of x_BTD's tokens are.
        """
        kept: dict[str, Any] = {"lengths_B": lengths_B, "documents_BT": documents_BT, "positions_BT": positions_BT}
        alone = wanted_N is not None and state is None
        if is_fused(x_BTD) and not ((self.dropout and self.training) or alone or keep is not None):
            x_BTD, state = self.mixer.add_to(x_BTD, self.norm1, state, wanted_N=wanted_N, **kept)
            if isinstance(self.feedforward, FeedForward):
                return self.feedforward.add_to(x_BTD, self.norm2), state
            return x_BTD + self.feedforward(self.norm2(x_BTD)), state
        if alike is not None:  # few rows, on which the norm costs nothing
            y_BTD = self.mixer.of_rows(self.norm1(alike.rows_UD), alike.index_BT, positions_BT=positions_BT)
        elif wanted_N is not None and state is None:
            x_BTD, normed_BTD = self.norm1.of_sum(x_BTD, None)
            y_BTD = self.mixer.at(normed_BTD, wanted_N, **kept)
            x_BTD = x_BTD.flatten(0, 1).index_select(0, wanted_N)
        else:
            x_BTD, normed_BTD = self.norm1.of_sum(x_BTD, None)
            y_BTD, state = self.mixer(normed_BTD, state, **kept)
            if keep is not None:
                x_BTD, y_BTD = x_BTD[:, x_BTD.shape[1] - keep :], y_BTD[:, y_BTD.shape[1] - keep :]
            if wanted_N is not None:
                x_BTD, y_BTD = (each.flatten(0, 1).index_select(0, wanted_N) for each in (x_BTD, y_BTD))
        x_BTD, normed_BTD = self.norm2.of_sum(x_BTD, self._drop(y_BTD))
        if isinstance(self.feedforward, FeedForward) and not self.dropout:
            return self.feedforward(normed_BTD, x_BTD), state
        return x_BTD + self._drop(self.feedforward(normed_BTD)), state

    def start_as_identity(self) -> None:
        """Set both maps into the residual stream to zero, so that the block adds nothing until it is trained."""
        for linear in (self.mixer.out, self.feedforward.output):
            nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _drop(self, y_BTD: Tensor) -> Tensor:
        return functional.dropout(y_BTD, self.dropout, self.training) if self.dropout else y_BTD


def make_blocks(
    config: BlockConfig,
    mixers: tuple[MixerConfig, ...],
    context: MixerContext,
    std: float,
    mixtures: Mapping[int, tuple[int, int]] | None = None,
) -> nn.ModuleList:
    """Return a new stack of blocks; raise UserError that names the layer pattern if a mixer does not fit.

    `mixtures` gives blocks, by their numbers, a mixture of so many feed-forwards, of which a token goes to so many.
    """
    shrink = output_shrink(len(mixers))
    # All mixers before all feed-forwards: the order in which a seed's numbers are drawn.
    built = [_make_mixer(mixer, context) for mixer in mixers]
    for mixer in built:
        mixer.out.weight.data.mul_(shrink)
    mixtures = mixtures or {}
    return nn.ModuleList(
        Block(config, mixer, std, std * shrink, context.backends, mixtures.get(index))
        for index, mixer in enumerate(built)
    )


def _make_mixer(config: MixerConfig, context: MixerContext) -> Mixer:
    try:
        return config.build(context)
    except UserError as error:
        raise UserError(f"model.layers: {config.kind}: {error}") from None


def check_numbers(config: Any, names: tuple[str, ...]) -> None:
    """Raise UserError unless each named field is null or at least 1, and heads divide the width; check dropout too."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: {value} is not allowed; allowed: 1 or more")
    if config.width % config.heads:
        raise UserError(f"heads: {config.heads} heads do not divide the width {config.width}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout: {config.dropout} is not allowed; allowed: 0 up to, but not including, 1")


def check_choices(config: Any, choices: dict[str, tuple[str, ...]]) -> None:
    """Raise UserError unless each field has one of its allowed values."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"{name}: {getattr(config, name)!r} is not allowed; allowed: {', '.join(allowed)}")


def check_backends(backends: dict[str, str]) -> None:
    """Raise UserError unless each key is an operator and each value one of its backends."""
    for operator, backend in backends.items():
        if operator not in dispatch.operators():
            raise UserError(f"backends: unknown operator {operator!r}; {nearest(operator, dispatch.operators())}")
        known = ["auto", *dispatch.backends(operator)]
        if backend not in known:
            raise UserError(f"backends.{operator}: {backend!r} is not allowed; {nearest(backend, known)}")
