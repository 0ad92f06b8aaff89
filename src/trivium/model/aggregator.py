"""The aggregator of the prefix-scan model: two chunk summaries become one.

Shapes: N pairs, c places of a chunk, S = 2 c places of a pair, D width, H heads, K head width.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from trivium.model import feedforward
from trivium.model.block import (
    BlockConfig,
    block_params,
    initial_std,
    make_norm,
    norm_params,
    output_shrink,
)
from trivium.model.feedforward import FeedForward
from trivium.ops.linear import Linear


class UnmaskedAttention(nn.Module):
    """Softmax attention in which every place reads every place, the later ones too; no biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(width, 2 * width, bias=False)
        self.out = Linear(width, width, bias=False)

    def forward(self, x_NSD: Tensor, keep: int) -> Tensor:
        """Return what the last `keep` places read: (N, keep, D)."""
        q_NHSK = self._split(self.query(x_NSD[:, -keep:]))
        k_NSD, v_NSD = self.key_value(x_NSD).chunk(2, dim=-1)
        y_NHSK = scaled_dot_product_attention(q_NHSK, self._split(k_NSD), self._split(v_NSD), is_causal=False)
        return self.out(y_NHSK.transpose(1, 2).flatten(2))

    def _split(self, x_NSD: Tensor) -> Tensor:
        return x_NSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PairBlock(nn.Module):
    """Norm, unmasked attention, norm, feed-forward; each half adds to the residual stream."""

    def __init__(self, config: BlockConfig, heads: int, std: float, shrink: float):
        super().__init__()
        self.norm1 = make_norm(config.norm, config.width)
        self.attention = UnmaskedAttention(config.width, heads)
        self.attention.out.weight.data.mul_(shrink)
        self.norm2 = make_norm(config.norm, config.width)
        self.feedforward = FeedForward(config.feedforward, config.width, config.hidden_width, std, std * shrink)
        self.dropout = config.dropout

    def forward(self, x_NSD: Tensor, keep: int) -> Tensor:
        """Return the last `keep` places."""
        x_NSD, y_NSD = x_NSD[:, -keep:], self.attention(self.norm1(x_NSD), keep)
        x_NSD, normed_NSD = self.norm2.of_sum(x_NSD, self._drop(y_NSD))
        return x_NSD + self._drop(self.feedforward(normed_NSD))

    def _drop(self, y_NSD: Tensor) -> Tensor:
        return functional.dropout(y_NSD, self.dropout, self.training) if self.dropout else y_NSD


class Aggregator(nn.Module):
    """Agg(a, b): the last c places of LN(T1([a; b])), T1 a stack of blocks without a mask (arXiv 2506.10918).

    A learned vector for each of the pair's 2 c places tells T1 which summary is the earlier one. Of the last block
    only the places that are kept are computed.
    """

    def __init__(self, config: BlockConfig, heads: int, layers: int, chunk: int):
        super().__init__()
        std = initial_std(config.width)
        self.places = nn.Embedding(2 * chunk, config.width)
        nn.init.normal_(self.places.weight, std=std)
        self.blocks = nn.ModuleList(PairBlock(config, heads, std, output_shrink(layers)) for _ in range(layers))
        self.norm = make_norm(config.norm, config.width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the summary (..., c, D) of each pair of summaries (..., c, D), the earlier one first."""
        chunk = a.shape[-2]
        x_NSD = torch.cat((a, b), dim=-2).flatten(0, -3) + self.places.weight
        blocks = cast("list[PairBlock]", list(self.blocks))
        for index, block in enumerate(blocks):
            x_NSD = block(x_NSD, chunk if index == len(blocks) - 1 else 2 * chunk)
        return self.norm(x_NSD).view(b.shape)


def num_params(config: BlockConfig, layers: int, chunk: int) -> int:
    """Return the parameters of an Aggregator."""
    width = config.width
    blocks = layers * (block_params(config) + 4 * width * width)
    return 2 * chunk * width + blocks + norm_params(config.norm, width)


def flops(config: BlockConfig, layers: int, chunk: int) -> int:
    """Return the FLOPs of one call on one pair, forward, 2 for a multiply-add: keys and values of 2 c places; queries,
    attention, output and feed-forward of 2 c, in the last block of c.
    """
    width, places = config.width, 2 * chunk
    ff = feedforward.flops_per_token(config.feedforward, width, config.hidden_width)
    kept = (layers - 1) * places + chunk
    return layers * places * 4 * width * width + kept * (4 * width * width + 4 * width * places + ff)
