"""What the tests of `simplicial_decode` compute: here, or in the process in which Triton interprets."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.triton_cases import DEVICE, settings


def draw(
    lengths: list[int],
    tokens: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 5,
    slots: tuple[int, int] = (5, 3),
    dtype: torch.dtype = torch.float32,
    garbage: float = torch.nan,
    loud: float = 1.0,
    windows: tuple[int, int] | None = None,
    form: str = "trilinear",
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return q and rings (k1, k2, v1, v2) of rows that have seen `lengths` tokens, and what they saw in full.

    Slots that no token reached hold `garbage`. The full sequences are left-aligned and as long as the longest row.
    """
    generator = torch.Generator().manual_seed(0)
    rows, longest = len(lengths), max(*lengths, 1)

    def normal(count: int) -> Tensor:
        return torch.randn(rows, longest, count, width, generator=generator).to(dtype).to(DEVICE)

    full: list[Tensor | None] = [loud * normal(heads), *(normal(kv_heads) for _ in range(4))]
    sizes = [*slots, *slots]
    if form == "factorized":
        full[4], sizes[2] = None, min(slots)
    rings: list[Tensor | None] = []
    for count, x in zip(sizes, full[1:], strict=True):
        ring = None
        if x is not None:
            ring = torch.full((rows, count, kv_heads, width), garbage, dtype=dtype, device=DEVICE)
            for b, length in enumerate(lengths):
                for position in range(max(0, length - count), length):
                    ring[b, position % count] = x[b, position]
        rings.append(ring)
    q = torch.full((rows, tokens, heads, width), 1.0, dtype=dtype, device=DEVICE)
    for b, length in enumerate(lengths):
        there = min(tokens, length)
        assert full[0] is not None
        q[b, tokens - there :] = full[0][b, length - there : length]
    return [q, *rings], full


def error(backend: str, lengths: list[int], *, windows: tuple[int, int] | None = None, **draws: Any) -> float:
    """Return the distance of `backend` from the float64 reference over whole sequences, relative to its size or 1."""
    from trivium.ops import simplicial_attention, simplicial_decode

    tokens, form = draws.get("tokens", 1), draws.get("form", "trilinear")
    windows = windows or draws.get("slots", (5, 3))
    options: dict[str, Any] = {"window1": windows[0], "window2": windows[1], "form": form}
    rings, full = draw(lengths, **draws)
    counts = torch.tensor(lengths, device=DEVICE)
    with settings(), torch.no_grad():
        found = simplicial_decode(*rings, counts, backend=backend, **options)  # pyright: ignore
    double = [None if x is None else x.double() for x in full]
    truth = simplicial_attention(*double, backend="reference" if DEVICE == "cpu" else "torch", **options)  # pyright: ignore
    wanted = torch.zeros(found.shape, dtype=torch.float64, device=DEVICE)
    for b, length in enumerate(lengths):
        there = min(tokens, length)
        wanted[b, tokens - there :] = truth[b, length - there : length]
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1))


def check_registration(backend: str = "triton") -> None:
    """Raise what torch.library.opcheck finds wrong."""
    from trivium.ops.simplicial import decode_launch

    rings, _ = draw([3, 9], width=4)
    q, k1, k2, v1, v2 = (x.nan_to_num() for x in rings if x is not None)
    lengths = torch.tensor([3, 9], device=DEVICE)
    torch.library.opcheck(decode_launch._decode.op, (q, k1, v1, k2, v2, lengths, 5, 3, 0.5, 0))


def refusal(backend: str, **change: Any) -> str:
    """Return what the error says of a call that the backend cannot serve."""
    from trivium.ops import simplicial_decode

    rings, _ = draw([3, 9], width=4, garbage=0.0)
    lengths = torch.tensor([3, 9], device=DEVICE)
    if change.pop("gradients", False):
        rings = [None if x is None else x.requires_grad_() for x in rings]
    if change.pop("double", False):
        rings = [None if x is None else x.double() for x in rings]
    if change.pop("strided", False):
        assert rings[1] is not None
        rings[1] = rings[1].transpose(1, 3).contiguous().transpose(1, 3)
    try:
        simplicial_decode(*rings, lengths, **({"window1": 5, "window2": 3, "backend": backend} | change))  # pyright: ignore
    except ValueError as problem:
        return str(problem)
    return "nothing"
