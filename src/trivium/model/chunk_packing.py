"""Packed documents as chunks: which chunk of which document each chunk is, and documents laid side by side; and rows
that reach their boundaries at different times.

Shapes: B rows, T tokens, m chunks of a row, c tokens of a chunk, D width, N documents of all rows.
"""

from collections.abc import Callable, Sequence
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

    def predict(
        self, predictor: Callable[[Tensor | None, Tensor], Tensor], summaries_mNcD: Tensor, x_BmcD: Tensor, first: int
    ) -> Tensor:
        """Return (B, m c, D), what predictor(summary, chunk) makes of the chunks from number `first` on, each behind
        the summary of its document's earlier ones; a document's first has none.
        """
        y_BmcD = torch.zeros_like(x_BmcD)
        place_Bm, document_Bm = (ids[:, first : first + x_BmcD.shape[1]] for ids in (self.place_Bm, self.document_Bm))
        for chosen_Bm, alone in ((place_Bm == 0, True), (place_Bm > 0, False)):
            if bool(chosen_Bm.any()):
                summary_NcD = None if alone else summaries_mNcD[place_Bm[chosen_Bm], document_Bm[chosen_Bm]]
                y_NcD = predictor(summary_NcD, x_BmcD[chosen_Bm])
                y_BmcD = y_BmcD.to(y_NcD.dtype).index_put((chosen_Bm,), y_NcD)
        return y_BmcD.flatten(1, 2)


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


def in_order(parts: Sequence[Tensor], offset_B: Tensor, tokens: int, chunk: int) -> Tensor:
    """Return (B, T, D) from parts (B, w, D), the T tokens of rows that stand `offset_B` behind their last boundary: a
    row's first part ends at its first boundary, every later one is a chunk.
    """
    width = parts[0].shape[1]
    index_T = torch.arange(tokens, device=offset_B.device)
    place_BT = offset_B[:, None] + index_T
    part_BT = place_BT // chunk
    source_BT = part_BT * width + torch.where(part_BT > 0, place_BT % chunk, index_T)
    source_BT = source_BT.clamp(max=len(parts) * width - 1)
    return torch.cat(tuple(parts), dim=1).gather(1, source_BT[..., None].expand(-1, -1, parts[0].shape[2]))
