"""Heads: how a mixer's width is shared among them, and what to say when it cannot be."""

from torch import Tensor, nn
from torch.nn import functional

from trivium.mixers.base import MixerContext
from trivium.registry import UserError


def check_count(name: str, value: int | None) -> None:
    """Raise UserError unless `value` is None or at least 1."""
    if value is not None and value < 1:
        raise UserError(f"{name}: {value} is not allowed; give at least 1, or null")


def num_kv_heads(context: MixerContext, kv_heads: int | None) -> int:
    """Return the number of key/value heads; raise UserError where heads do not divide what they should."""
    if context.heads < 1 or context.width % context.heads:
        raise UserError(f"heads: {context.heads} do not divide the width {context.width}")
    if kv_heads is not None and context.heads % kv_heads:
        raise UserError(f"kv_heads: {kv_heads} do not divide the {context.heads} heads")
    return context.heads if kv_heads is None else kv_heads


class HeadNorm(nn.RMSNorm):
    """RMS norm over the head width (arXiv 1910.07467), in the precision of its input: autocast keeps weights wide."""

    def __init__(self, head_width: int):
        super().__init__(head_width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
