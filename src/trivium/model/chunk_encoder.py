"""The encoder of the prefix-scan model: embedding plus position, in the chunk or in the sequence.

Shapes: B rows, T tokens, c tokens of a chunk, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.model.base import ModelContext
from trivium.model.block import Norm, initial_std, make_norm
from trivium.model.positions import Positions

ChunkPositions = Literal["chunk", "absolute"]


def num_places(kind: ChunkPositions, chunk: int, max_length: int) -> int:
    """Return the rows of the trained table of positions."""
    return chunk if kind == "chunk" else max_length


class Encoder(nn.Module):
    """Tokens to vectors. With `kind` "chunk" a position counts from the start of its chunk, so that words longer than
    those of training meet no vector that they have not seen; with "absolute" it counts from the start of the sequence.
    With a `norm` the sum is normalised.
    """

    def __init__(
        self,
        kind: ChunkPositions,
        width: int,
        chunk: int,
        max_length: int,
        dropout: float,
        context: ModelContext,
        norm: Norm | None = None,
    ):
        super().__init__()
        self.chunk, self.dropout = chunk, dropout
        std = initial_std(width)
        self.embedding = nn.Embedding(context.vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=std)
        self.places = nn.Embedding(chunk, width) if kind == "chunk" else None
        self.positions = Positions("learned", width, max_length, context, std) if kind == "absolute" else None
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=std)
        self.norm = None if norm is None else make_norm(norm, width)

    def forward(
        self,
        tokens_BT: Tensor,
        past_B: Tensor | None = None,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Return (B, T, D) for tokens that follow `past_B` others. Packed documents begin at chunk boundaries. Raises
        ValueError when a sequence is longer than the table of absolute positions.
        """
        x_BTD = self.embedding(tokens_BT)
        if self.places is not None:
            ids = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            x_BTD = x_BTD + self.places((ids if past_B is None else past_B[:, None] + ids) % self.chunk)
        if self.positions is not None:
            added, _, _ = self.positions(tokens_BT, past_B, None, lengths_B, documents_BT, x_BTD.dtype)
            x_BTD = x_BTD + added
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return functional.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD
