"""Rotary positions: a vector is turned by an angle that grows with its place, so that a product of two depends on
their distance alone (arXiv 2104.09864). Shapes: B rows (or 1), T tokens, H heads, K head width.
"""

import torch
from torch import Tensor


def count_positions(
    batch: int, tokens: int, device: torch.device, length_B: Tensor | None = None, documents_BT: Tensor | None = None
) -> Tensor:
    """Return int64 places (B or 1, T): behind `length_B` tokens, or from the start of each run in `documents_BT`."""
    place_T = torch.arange(tokens, device=device)
    if length_B is not None:
        return length_B[:, None] + place_T
    if documents_BT is None or tokens == 0:
        return place_T[None]
    starts_BT = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return place_T - (place_T * starts_BT).cummax(dim=1).values


def _turn(a: Tensor, b: Tensor, positions_BT: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Turn the pairs (a, b), each (B, T, H, n), by position * base^(-i/n)."""
    precise = torch.float64 if a.dtype == torch.float64 else torch.float32
    pairs = a.shape[-1]
    rate_n = base ** (-torch.arange(pairs, device=a.device, dtype=precise) / max(pairs, 1))
    angle_BT1n = (positions_BT.to(precise)[..., None] * rate_n)[:, :, None]
    cosine, sine = angle_BT1n.cos(), angle_BT1n.sin()
    wide_a, wide_b = a.to(precise), b.to(precise)
    return (wide_a * cosine - wide_b * sine).to(a.dtype), (wide_a * sine + wide_b * cosine).to(a.dtype)


def rotate(x_BTHK: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    """Turn channel i together with channel i + K/2; K is even."""
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat(_turn(first, second, positions_BT, base), dim=-1)


def rotate_triples(x_BTHK: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    """Turn each triple of channels about its third axis; the K mod 3 channels left over stay.

    All turns of one triple share an axis, hence det[R^i q; R^j k1; R^k k2] = det[q; R^(j-i) k1; R^(k-i) k2]: the
    determinant form of 2-simplicial attention becomes relative (arXiv 2507.02754, section 5).
    """
    triples = x_BTHK.shape[-1] // 3
    whole, rest = x_BTHK[..., : 3 * triples].unflatten(-1, (triples, 3)), x_BTHK[..., 3 * triples :]
    first, second = _turn(whole[..., 0], whole[..., 1], positions_BT, base)
    return torch.cat((torch.stack((first, second, whole[..., 2]), dim=-1).flatten(-2), rest), dim=-1)
