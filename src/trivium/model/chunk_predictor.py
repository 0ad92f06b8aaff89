"""The predictor of the prefix-scan model: causal blocks over the summary of the past and one chunk.

Shapes: B rows, T tokens, N chunks, c tokens of a whole chunk, S = c + T places, D width.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from trivium.mixers.base import MixerConfig, MixerContext, State
from trivium.model.block import Block, BlockConfig, initial_std, make_blocks, make_norm
from trivium.model.root_counter import put


def read_pieces(length: int, chunk: int) -> list[tuple[int, int]]:
    """Return (count, places) of what the predictor reads of `length` tokens: the first chunk, whole ones and a short
    one behind their summaries.
    """
    whole, rest = divmod(length, chunk)
    pieces = [(1, min(chunk, length)), (max(whole - 1, 0), 2 * chunk)]
    return [*pieces, (1 if whole and rest else 0, chunk + rest)]


class Predictor(nn.Module):
    """LN(T2([s; x])) on the places of x (arXiv 2506.10918). A learned vector tells each of the 2 c places its number;
    the first chunk, which has no summary, stands where the others stand. The last feed-forward reads no summary: what
    it would give is not used.
    """

    def __init__(self, config: BlockConfig, mixers: tuple[MixerConfig, ...], context: MixerContext, chunk: int):
        super().__init__()
        self.chunk = chunk
        std = initial_std(config.width)
        self.places = nn.Embedding(2 * chunk, config.width)
        nn.init.normal_(self.places.weight, std=std)
        self.blocks = make_blocks(config, mixers, context, std)
        self.norm = make_norm(config.norm, config.width)

    def forward(self, summary_NcD: Tensor | None, own_NTD: Tensor) -> Tensor:
        """Return (N, T, D), the prediction at each token of the chunks `own`, T up to c, behind their summaries."""
        tokens = own_NTD.shape[1]
        x_NSD = own_NTD + self.places.weight[self.chunk : self.chunk + tokens]
        if summary_NcD is not None:
            x_NSD = torch.cat((summary_NcD + self.places.weight[: self.chunk], x_NSD), dim=1)
        blocks = self._blocks()
        for block in blocks:
            x_NSD, _ = block(x_NSD, None, None, None, None, tokens if block is blocks[-1] else None)
        return self.norm(x_NSD)

    def init_states(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> list[State]:
        """Return the empty states of the mixers, with room for a summary and a chunk."""
        return [block.mixer.init_state(batch, 2 * self.chunk, device, dtype) for block in self._blocks()]

    def step(
        self, own_BTD: Tensor, offset_B: Tensor, added_B: Tensor | None, states: list[State]
    ) -> tuple[Tensor, list[State]]:
        """Continue each row's chunk at its offset; return (B, T, D) and the new states."""
        place_BT = self.chunk + offset_B[:, None] + torch.arange(own_BTD.shape[1], device=own_BTD.device)
        x_BTD = own_BTD + self.places(place_BT.clamp(max=2 * self.chunk - 1))
        new: list[Any] = []
        for block, state in zip(self._blocks(), states, strict=True):
            x_BTD, state = block(x_BTD, state, added_B, None, None)
            new.append(state)
        return self.norm(x_BTD), new

    def begin(
        self, summary_NcD: Tensor, rows_N: Tensor, wanted_N: Tensor | None, states: list[State], dtype: torch.dtype
    ) -> list[State]:
        """Return the states with `rows_N` begun anew behind their summaries, those that the mask wants if there is one.

        In place under no_grad.
        """
        x_NcD = summary_NcD + self.places.weight[: self.chunk]
        new: list[State] = []
        begun = self.init_states(len(rows_N), rows_N.device, dtype)
        blocks = self._blocks()
        for block, state, fresh in zip(blocks, states, begun, strict=True):
            x_NcD, fresh = block(x_NcD, fresh, None, None, None, 0 if block is blocks[-1] else None)
            tensors = iter(fresh.tensors())
            new.append(state._map(lambda old, tensors=tensors: put(old, (rows_N,), next(tensors), wanted_N)))
        return new

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))
