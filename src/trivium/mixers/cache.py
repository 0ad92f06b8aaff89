"""Ring buffers over time: what attention keeps of the past, for rows that may be at different lengths.

Shapes: B rows, C slots, T new tokens, S keys. Position p of a row lies in slot p mod C, so that a ring of C slots
holds the last C positions. `length_B` counts the tokens a row has seen; `added_B` (None: all T) those it gets now.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from trivium.ops.cached_attention.step import copy_into, write_one

_fixed: ContextVar[bool] = ContextVar("fixed_shapes", default=False)
_empty: ContextVar[bool] = ContextVar("known_empty", default=False)


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Let no value of a tensor decide what runs, on the CPU too: what a captured CUDA graph asks for."""
    token = _fixed.set(True)
    try:
        yield
    finally:
        _fixed.reset(token)


@contextmanager
def known_empty() -> Iterator[None]:
    """Say that no state within has seen a token yet, which a device would have to be asked."""
    token = _empty.set(True)
    try:
        yield
    finally:
        _empty.reset(token)


def is_known_empty() -> bool:
    """Say whether no state has seen a token yet, whatever its rings hold: see `State.counters`."""
    return _empty.get()


def may_look(tensor: Tensor) -> bool:
    """Say whether its values may decide what is computed: not where they are unknown, nor in a captured graph."""
    if tensor.device.type == "meta" or torch.compiler.is_compiling() or _fixed.get():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def cheap_to_look(tensor: Tensor) -> bool:
    """Say whether its values may decide, and asking for them waits for no device."""
    return tensor.device.type == "cpu" and may_look(tensor)


def autocast_dtype(device: torch.device | str) -> torch.dtype | None:
    """Return the dtype in which autocast has products made on `device`; None where it is off."""
    kind = torch.device(device).type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def dtype_of(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the dtype of a ring: autocast's where it is on, since keys and values come in it."""
    narrow = autocast_dtype(device) if dtype == torch.float32 else None
    return narrow or dtype


def without_padding(x_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Zero what lies behind each row's tokens: a weight of 0 times a NaN left there would still be NaN."""
    if lengths_B is None:
        return x_BTD
    padding_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device) >= lengths_B[:, None]
    return x_BTD.masked_fill(padding_BT[..., None], 0)


def slot_positions(length_B: Tensor, slots: int) -> Tensor:
    """Return (B, C) the newest position p < length with p mod C = slot; negative where the slot is empty."""
    newest_B1 = length_B[:, None] - 1
    return newest_B1 - (newest_B1 - torch.arange(slots, device=length_B.device)) % slots


def visible(query_BT: Tensor, key_BS: Tensor, window: int | None) -> Tensor:
    """Return (B, T, S) bool: which key positions each query position may read; negative keys are empty."""
    age_BTS = query_BT[:, :, None] - key_BS[:, None, :]
    allowed_BTS = (age_BTS >= 0) & (key_BS >= 0)[:, None, :]
    return allowed_BTS if window is None else allowed_BTS & (age_BTS < window)


def capacity(window: int | None, max_length: int) -> int:
    """Return the slots that a ring needs for `max_length` tokens under `window`."""
    return max_length if window is None else min(window, max_length)


def check_room(length_B: Tensor, added_B: Tensor | None, tokens: int, slots: int, window: int | None) -> None:
    """Raise ValueError if a row outgrows a ring smaller than its window.

    Only on the CPU: elsewhere the check would wait for the device, and a captured step cannot raise.
    """
    if (window is not None and slots >= window) or not length_B.numel() or not cheap_to_look(length_B):
        return
    longest = int((length_B + (tokens if added_B is None else added_B)).max())
    if longest > slots:
        raise ValueError(f"sequence of {longest} tokens does not fit the state's room of {slots}")


def used_slots(length_B: Tensor, slots: int) -> int:
    """Return how many leading slots may hold something; all of them where asking would wait for a device."""
    if _empty.get():
        return 0
    if not cheap_to_look(length_B):
        return slots
    return min(slots, int(length_B.max())) if length_B.numel() else 0


def held_slots(length_B: Tensor, added_B: Tensor | None, slots: int) -> tuple[int, Tensor | None]:
    """Return (how many leading slots to read after one more token a row, how many of them each row holds, at least 1).

    None instead of the rows' counts says that each row holds all of them. In a ring of its window's size every slot
    that holds something is visible to the next token.
    """
    count_B = (length_B + (1 if added_B is None else added_B)).clamp(1, slots)
    if not cheap_to_look(count_B) or not count_B.numel():
        return slots, count_B
    used = int(count_B.max())
    return used, None if int(count_B.min()) == used else count_B


def write(ring_BCHK: Tensor, new_BTHK: Tensor, length_B: Tensor, added_B: Tensor | None) -> Tensor:
    """Return the ring after the new tokens; in place under no_grad, a new tensor under grad."""
    slots, tokens = ring_BCHK.shape[1], new_BTHK.shape[1]
    new_BTHK = new_BTHK.to(ring_BCHK.dtype)
    in_place = not torch.is_grad_enabled()
    if in_place and tokens == 1:
        return write_one(ring_BCHK, new_BTHK[:, 0], length_B, added_B)
    first = _same_place(length_B, added_B, tokens, slots) if in_place else None
    if first is not None:
        copy_into(ring_BCHK[:, first : first + tokens], new_BTHK)
        return ring_BCHK
    position_BC = slot_positions(length_B + (tokens if added_B is None else added_B), slots)
    source_BC = position_BC - length_B[:, None]
    index_BCHK = source_BC.clamp(min=0)[:, :, None, None].expand(-1, -1, *ring_BCHK.shape[2:])
    written_BCHK = torch.where((source_BC >= 0)[:, :, None, None], new_BTHK.gather(1, index_BCHK), ring_BCHK)
    return ring_BCHK.copy_(written_BCHK) if in_place else written_BCHK


def _same_place(length_B: Tensor, added_B: Tensor | None, tokens: int, slots: int) -> int | None:
    """Return the slot of the first new token if every row's new ones follow one another from there, else None.

    Where all is known to be empty rows may be shorter than T: what is written behind their own tokens is never read.
    """
    if tokens > slots:
        return None
    if _empty.get():
        return 0
    if not cheap_to_look(length_B) or not length_B.numel():
        return None
    first, last = int(length_B.min()), int(length_B.max())
    return first if first == last and first + tokens <= slots and added_B is None else None


def advance(length_B: Tensor, added_B: Tensor | None, tokens: int) -> Tensor:
    """Return the lengths after the new tokens; in place under no_grad."""
    added = tokens if added_B is None else added_B
    return length_B + added if torch.is_grad_enabled() else length_B.add_(added)


def extend(
    rings: list[Tensor], news: list[Tensor], length_B: Tensor, added_B: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return (the rings after the new tokens, what the new queries may read, its positions (B, S)).

    One new token is written first, and the ring itself is read. Several are read behind the ring as it was: an early
    one still needs what a late one overwrites.
    """
    slots, tokens = rings[0].shape[1], news[0].shape[1]
    if tokens == 1:
        written = [write(ring, new, length_B, added_B) for ring, new in zip(rings, news, strict=True)]
        # A finished row that has seen nothing reads the zeros of slot 0: a softmax over nothing would be NaN.
        after_B = (length_B + (tokens if added_B is None else added_B)).clamp(min=1)
        used = used_slots(after_B, slots)
        readable = [ring[:, :used].to(new.dtype) for ring, new in zip(written, news, strict=True)]
        return written, readable, slot_positions(after_B, slots)[:, :used]
    used = used_slots(length_B, slots)
    new_BT = query_positions(length_B, None, tokens)
    readable = [torch.cat((ring[:, :used].to(new.dtype), new), dim=1) for ring, new in zip(rings, news, strict=True)]
    position_BS = torch.cat((slot_positions(length_B, slots)[:, :used], new_BT), dim=1)
    written = [write(ring, new, length_B, added_B) for ring, new in zip(rings, news, strict=True)]
    return written, readable, position_BS


def query_positions(length_B: Tensor, added_B: Tensor | None, tokens: int) -> Tensor:
    """Return (B, T) where the new tokens stand; one that a finished row ignores stands on the row's last token."""
    position_BT = length_B[:, None] + torch.arange(tokens, device=length_B.device)
    return position_BT if added_B is None or tokens > 1 else (position_BT + added_B[:, None] - 1).clamp(min=0)


def append(
    rings: list[Tensor], news: list[Tensor], length_B: Tensor, added_B: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return (the rings after the new tokens, rings that hold all that the new queries read, their lengths (B,)).

    As `extend`, for operators that read rings: the second rings hold T - 1 slots more where T > 1, and there the
    tokens behind a row's own count as its own, so that the last query stands at length - 1 in every row.
    """
    tokens = news[0].shape[1]
    if tokens == 1:
        after_B = length_B + (1 if added_B is None else added_B)
        written = [write(ring, new, length_B, added_B) for ring, new in zip(rings, news, strict=True)]
        used = [max(used_slots(after_B, ring.shape[1]), 1) for ring in rings]
        # The leading slots of a ring that has not come around are a ring too.
        held = [ring[:, :n].to(new.dtype) for ring, new, n in zip(written, news, used, strict=True)]
        return written, held, after_B
    held = [_longer(ring, new, length_B) for ring, new in zip(rings, news, strict=True)]
    after_B = length_B + tokens
    return [write(ring, new, length_B, added_B) for ring, new in zip(rings, news, strict=True)], held, after_B


def _longer(ring_BCHK: Tensor, new_BTHK: Tensor, length_B: Tensor) -> Tensor:
    """Return a ring of the used slots and T more, which holds what the ring held and the new tokens."""
    slots, tokens = ring_BCHK.shape[1], new_BTHK.shape[1]
    used = used_slots(length_B, slots)
    both = torch.cat((ring_BCHK[:, :used].to(new_BTHK.dtype), new_BTHK), dim=1)
    position_BS = slot_positions(length_B + tokens, used + tokens)
    new_BS = position_BS - length_B[:, None]
    source_BS = torch.where(new_BS < 0, position_BS.clamp(min=0) % slots, used + new_BS)
    return both.gather(1, source_BS[:, :, None, None].expand(-1, -1, *both.shape[2:]))
