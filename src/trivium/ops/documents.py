"""Packed documents, told by ids or by offsets: what every operator with `documents` checks and makes of them."""

import itertools

import torch
from torch import Tensor

from trivium.ops.arguments import WHOLE, check_tensors


def document_ids(offsets: Tensor, tokens: int, rows: int = 1) -> Tensor:
    """Return ids (rows, tokens) in int32 of documents that lie end to end, row after row.

    Document n holds the tokens offsets[n] up to offsets[n + 1], counted through all rows: `offsets` (n + 1,) begins
    with 0, increases and ends with rows * tokens, and every row begins a document, since none spans two rows. The
    offsets are read on the host, which waits for the device: call this outside of CUDA graphs and of torch.compile
    (which with fullgraph=True wraps what is raised in an error of its own). Raises ValueError for any other offsets.
    """
    check_tensors(offsets=offsets)
    if offsets.ndim != 1 or offsets.dtype not in WHOLE:
        raise ValueError(f"offsets: {offsets.dtype} of shape {tuple(offsets.shape)}; give integers (documents + 1,)")
    capturing = offsets.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        raise ValueError(
            "offsets: the host cannot read them under torch.compile or in a CUDA graph; "
            "give ids: trivium.ops.document_ids(offsets, tokens, rows)"
        )
    found, every = offsets.tolist(), rows * tokens
    if not found or found[0] != 0 or found[-1] != every:
        ends = f"from {found[0]} to {found[-1]}" if found else "none"
        raise ValueError(f"offsets: {ends}; they go from 0 to {every}, the tokens of {rows} rows of {tokens}")
    pairs = list(itertools.pairwise(found))
    for first, after in pairs:
        if after <= first:
            raise ValueError(f"offsets: {first}, then {after}; each is larger than the one before")
    for n, (first, after) in enumerate(pairs):
        if first // tokens != (after - 1) // tokens:
            raise ValueError(
                f"offsets: document {n} holds the tokens {first} to {after - 1} of rows of {tokens}; "
                "it must lie in one row"
            )
    places = torch.arange(every, device=offsets.device)
    ids = torch.searchsorted(offsets.to(torch.int64), places, right=True, out_int32=True) - 1
    return ids.view(rows, tokens)


def checked_documents(documents: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the ids (B, T) of `documents`, which are ids (B, T) or offsets, for an input `like` (B, T, ...).

    Raises ValueError that says what they were and what is allowed.
    """
    if documents is None:
        return None
    check_tensors(documents=documents)
    rows, tokens = like.shape[:2]
    if documents.device != like.device:
        raise ValueError(f"documents: on {documents.device}, but q is on {like.device}; all must be on one device")
    if documents.ndim == 1 and documents.dtype in WHOLE:
        try:
            return document_ids(documents, tokens, rows)
        except ValueError as error:
            raise ValueError(f"documents: {error}") from None
    if tuple(documents.shape) != (rows, tokens) or documents.dtype not in WHOLE:
        raise ValueError(
            f"documents: {documents.dtype} of shape {tuple(documents.shape)}; "
            f"give ids, integers ({rows}, {tokens}), or offsets, integers (documents + 1,)"
        )
    return documents
