"""Where a token stands: position ids from tokens and state, and the tables that turn ids into vectors.

Shapes: B rows, T tokens, V vocabulary, D width. Everything is causal: the ids of a token depend on it and on what
came before, so that the parallel and the streaming form agree.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.model.base import ModelContext
from trivium.registry import UserError

PositionKind = Literal["learned", "sinusoidal", "rotary", "block", "coupled", "none"]
RUNS: tuple[PositionKind, ...] = ("block", "coupled")  # the schemes that number the digits of each run
RunTable = Literal["learned", "sinusoidal", "rotary"]
POSITION_BASE = 10_000.0


def document_starts(documents_BT: Tensor) -> Tensor:
    """Return (B, T) bool, true at the first token of each packed document (a run of one id)."""
    changed = documents_BT[:, 1:] != documents_BT[:, :-1]
    return functional.pad(changed, (1, 0), value=True)


def document_positions(starts_BT: Tensor) -> Tensor:
    """Return (B, T) int64, the place of each token in its document, from 0, given where the documents start."""
    index_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return index_T - (index_T * starts_BT).cummax(dim=1).values


def block_ids(digit_BT: Tensor, run_B: Tensor | None = None, starts_BT: Tensor | None = None) -> Tensor:
    """Return Abacus ids (B, T) int64: 1, 2, 3 ... inside each run of digits, 0 elsewhere (arXiv 2405.17399).

    `digit_BT` says which tokens are digits, `run_B` how many digits the row ended with so far, `starts_BT` where
    packed documents start.
    """
    index_T = torch.arange(digit_BT.shape[1], device=digit_BT.device)
    before = -1 if run_B is None else (-1 - run_B)[:, None]
    inside = before if starts_BT is None else torch.where(starts_BT, index_T - 1, before)
    last_break_BT = torch.where(digit_BT, inside, index_T).cummax(dim=1).values
    return index_T - last_break_BT


def closing_ids(ids_BT: Tensor, closing_BT: Tensor, run_B: Tensor | None, starts_BT: Tensor | None) -> Tensor:
    """Return block ids (B, T) in which a symbol that ends a number has the id that its next digit would have.

    `closing_BT` says which tokens are such symbols; the rest as in `block_ids`, which gave `ids_BT`.
    """
    first_B1 = torch.zeros_like(ids_BT[:, :1]) if run_B is None else run_B[:, None]
    before_BT = torch.cat((first_B1, ids_BT[:, :-1]), dim=1)
    if starts_BT is not None:
        before_BT = before_BT.masked_fill(starts_BT, 0)
    return torch.where(closing_BT & (before_BT > 0), before_BT + 1, ids_BT)


def table_rows(kind: PositionKind, max_length: int, block_offset: int = 0, run_table: RunTable = "learned") -> int:
    """Return the rows of the scheme's trained table; 0 for schemes without one."""
    if kind == "learned":
        return max_length
    return max_length + 1 + block_offset if kind in RUNS and run_table == "learned" else 0


def check_run_ids(kind: PositionKind, run_table: RunTable, closing: bool, block_offset: int, read_offset: int) -> None:
    """Raise UserError unless what is given of block and coupled ids is allowed, and is given with them alone."""
    if block_offset < 0 or (block_offset and kind not in RUNS):
        raise UserError(
            f"block_offset: {block_offset} is not allowed; allowed: 0 or more, and 0 without block or coupled positions"
        )
    if not 0 <= read_offset <= block_offset:
        raise UserError(f"read_offset: {read_offset} is not allowed; allowed: 0 to block_offset")
    for name, given in (("run_table", run_table != "learned"), ("closing", closing)):
        if kind not in RUNS and given:
            raise UserError(f"{name}: given with {kind} positions; allowed with block or coupled")


def check_position_base(kind: PositionKind, run_table: RunTable, base: float) -> None:
    """Raise UserError unless the base is a number above 1, the usual one where there are no waves."""
    waves = kind in ("sinusoidal", "rotary") or run_table != "learned"
    if not 1 < base < math.inf or (base != POSITION_BASE and not waves):
        raise UserError(f"position_base: {base} is not allowed; allowed: a number above 1, with sinusoids or rotary")


def check_positions(kind: PositionKind, context: ModelContext) -> None:
    """Raise UserError if the task gives the scheme nothing to count."""
    others = "allowed: learned, sinusoidal, rotary, none"
    if kind in RUNS and not context.digit_ids:
        raise UserError(f"model.positions: {kind} numbers the digits of a run, and this task has no digits; {others}")
    if kind == "coupled" and not context.least_first:
        raise UserError(
            "model.positions: coupled gives digits of equal significance one id, and this task writes numbers most "
            f"significant digit first: a number's first digit does not know how many follow; {others}, block"
        )


def embed(table: nn.Embedding, tokens_BT: Tensor, soft_BTV: Tensor | None = None) -> Tensor:
    """Return the embeddings (B, T, D) of tokens, or their mean under `soft_BTV`, a distribution at each place."""
    return table(tokens_BT) if soft_BTV is None else soft_BTV.to(table.weight.dtype) @ table.weight


class Positions(nn.Module):
    """Compute the ids of a scheme and the vectors that are added to the embeddings."""

    digit_V: Tensor
    closing_V: Tensor | None

    def __init__(
        self,
        kind: PositionKind,
        width: int,
        max_length: int,
        context: ModelContext,
        std: float,
        block_offset: int = 0,
        run_table: RunTable = "learned",
        position_base: float = POSITION_BASE,
        closing: bool = False,
        read_offset: int = 0,
    ):
        super().__init__()
        check_positions(kind, context)
        self.kind = kind
        self.width = width
        self.std = std
        self.block_offset, self.read_offset = block_offset, read_offset
        self.position_base = position_base
        self.turns = run_table == "rotary"
        self.rows = table_rows(kind, max_length, block_offset, run_table)
        if self.rows:
            self.table = nn.Embedding(self.rows, width)
            nn.init.normal_(self.table.weight, std=std)
        if kind in RUNS:
            digit_V = torch.tensor([index in context.digit_ids for index in range(context.vocab_size)])
            self.register_buffer("digit_V", digit_V, persistent=False)
        self.digit_ids = context.digit_ids
        if closing and not context.closing_ids:
            raise UserError("model.closing: this task says of no symbol that it ends a number; allowed: false")
        self.closing_ids = context.closing_ids
        closing_V = torch.tensor([index in context.closing_ids for index in range(context.vocab_size)])
        self.register_buffer("closing_V", closing_V if closing else None, persistent=False)

    def reset_buffers(self) -> None:
        """Fill what is not saved, where transformers has left it without values."""
        if self.kind in RUNS:
            self.digit_V.zero_()[list(self.digit_ids)] = True
        if self.closing_V is not None:
            self.closing_V.zero_()[list(self.closing_ids)] = True

    def forward(
        self,
        tokens_BT: Tensor,
        past_B: Tensor | None,
        run_B: Tensor | None,
        lengths_B: Tensor | None,
        documents_BT: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return what to add to the embeddings (in `dtype`), the positions for the mixers, the new digit-run counter.

        `past_B` counts the tokens that each row has seen, None in the parallel form. Raises ValueError (on the CPU;
        elsewhere looking would stall the device) when a sequence is longer than the table.
        """
        if self.kind == "none":
            return None, None, None
        starts_BT = None if documents_BT is None else document_starts(documents_BT)
        if self.kind in RUNS:
            ids_BT = block_ids(self.digit_V[tokens_BT], run_B, starts_BT)
            new_run_B = None if run_B is None else _last(ids_BT, run_B, lengths_B)
            if self.closing_V is not None:
                ids_BT = closing_ids(ids_BT, self.closing_V[tokens_BT], run_B, starts_BT)
            if self.block_offset:
                ids_BT = self._shift(ids_BT, starts_BT, drawn=self.training and past_B is None)
            if self.turns:
                return None, ids_BT, new_run_B
            if not self.rows:
                return self._sinusoid(ids_BT, dtype), None, new_run_B
            return self._look_up(ids_BT, lengths_B, "digits in a run"), None, new_run_B
        if starts_BT is not None:
            ids = document_positions(starts_BT)
        else:
            ids = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            ids = ids if past_B is None else past_B[:, None] + ids
        if self.kind == "rotary":
            return None, ids.expand(tokens_BT.shape), None
        if self.kind == "learned":
            return self._look_up(ids, lengths_B, "tokens"), None, None
        return self._sinusoid(ids, dtype), None, None

    def places(self) -> Tensor | None:
        """Return the table (P, D) whose row a token's place alone chooses, or None where it is not so."""
        return self.table.weight if self.kind == "learned" else None

    def _look_up(self, ids: Tensor, lengths_B: Tensor | None, what: str) -> Tensor:
        """Return rows of the table; `ids` is (B, T), or (T,) where every row counts alike."""
        if ids.ndim == 1:
            if len(ids) > self.rows:
                raise self._too_long(len(ids), what)
            return self.table.weight[: len(ids)]
        if lengths_B is not None:
            # What lies behind a row is never read, but its ids must stay inside the table.
            index_T = torch.arange(ids.shape[1], device=ids.device)
            ids = torch.where(index_T < lengths_B[:, None], ids, 0)
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            largest = int(ids.max())
            if largest >= self.rows:
                raise self._too_long(largest + (self.kind == "learned"), what)
        return self.table(ids)

    def _too_long(self, given: int, what: str) -> ValueError:
        allowed = self.rows - (self.kind in RUNS)
        return ValueError(
            f"{given} {what} given, but the {self.kind} position table of this model allows at most {allowed}; "
            "train with a larger model.max_length"
        )

    def _shift(self, ids_BT: Tensor, starts_BT: Tensor | None, drawn: bool) -> Tensor:
        """Add one offset a sequence to the ids of its digits, or of all its tokens where they are coupled."""
        if not drawn:
            return self._moved(ids_BT, self.read_offset) if self.read_offset else ids_BT
        offsets_BT = torch.randint(self.block_offset + 1, ids_BT.shape, device=ids_BT.device)
        if starts_BT is None:
            offsets_BT = offsets_BT[:, :1]
        else:
            index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
            offsets_BT = offsets_BT.gather(1, index_T - document_positions(starts_BT))
        return self._moved(ids_BT, offsets_BT)

    def _moved(self, ids_BT: Tensor, offsets: Tensor | int) -> Tensor:
        if self.kind == "coupled":
            return ids_BT + offsets
        return torch.where(ids_BT > 0, ids_BT + offsets, 0)

    def _sinusoid(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the table of "Attention is all you need", section 3.5, at the scale that embeddings start with."""
        half = (self.width + 1) // 2
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        rate_D = torch.exp(
            torch.arange(half, device=ids.device, dtype=precise) * (-math.log(self.position_base) / half)
        )
        angle = ids[..., None].to(precise) * rate_D
        table = torch.cat([angle.sin(), angle.cos()], dim=-1)[..., : self.width]
        return (table * (math.sqrt(2) * self.std)).to(dtype)


def _last(ids_BT: Tensor, before_B: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Return the id of each row's last new token; a row without new tokens keeps what it had."""
    if lengths_B is None:
        return ids_BT[:, -1]
    last_B = ids_BT.gather(1, (lengths_B - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(lengths_B > 0, last_B, before_B)
