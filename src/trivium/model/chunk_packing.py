"""Packed documents as chunks: which chunk of which document each chunk is, and documents laid side by side.

Shapes: B rows, T tokens, m chunks of a row, c tokens of a chunk, D width, N documents of all rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.model.positions import document_positions, document_starts


@dataclass(frozen=True)
class ChunkPacking:
    """The document of each chunk, counted through all rows, and the chunk's place in it."""

    document_Bm: Tensor
    place_Bm: Tensor

    def side_by_side(self, chunks_BmcD: Tensor) -> Tensor:
        """Return (depth, N, c, D): every document's chunks but those as late as the last of the longest one, which
        precede nothing. Behind a shorter document stand zeros, which no prefix that is read depends on.
        """
        place_Bm, document_Bm = (ids[:, : chunks_BmcD.shape[1]] for ids in (self.place_Bm, self.document_Bm))
        depth, documents = int(self.place_Bm.max()), int(self.document_Bm.max()) + 1
        kept_Bm = place_Bm < depth
        laid_mNcD = chunks_BmcD.new_zeros(depth, documents, *chunks_BmcD.shape[2:])
        return laid_mNcD.index_put((place_Bm[kept_Bm], document_Bm[kept_Bm]), chunks_BmcD[kept_Bm])


def pack_chunks(documents_BT: Tensor, chunk: int) -> ChunkPacking:
    """Return where each chunk stands; raise ValueError when a document (a run of one id) begins inside a chunk."""
    starts_BT = document_starts(documents_BT)
    inside_T = torch.arange(documents_BT.shape[1], device=documents_BT.device) % chunk != 0
    wrong_T = (starts_BT & inside_T).any(dim=0)
    if bool(wrong_T.any()):
        raise ValueError(
            f"documents_BT: a document begins at token {int(wrong_T.nonzero()[0])}, inside a chunk; "
            f"allowed: multiples of {chunk}"
        )
    starts_Bm = starts_BT[:, ::chunk]
    return ChunkPacking(starts_Bm.flatten().cumsum(0).view(starts_Bm.shape) - 1, document_positions(starts_Bm))
