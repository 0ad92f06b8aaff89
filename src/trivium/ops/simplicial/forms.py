"""What the fast backends share: precision, and the determinant form as a trilinear one of twice the width.

det[q; a; b] = <q, (a2,a3,a1) * (b3,b1,b2)> - <q, (a3,a1,a2) * (b2,b3,b1)> for each triple of channels; the D mod 3
channels left over are trilinear already (arXiv 2507.02754, section 5).
"""

import math

import torch
from torch import Tensor

from trivium.registry import UserError, nearest

FORMS = ("trilinear", "determinant", "factorized")


def check_numbers(form: str, width: int, window1: int, window2: int, scale: float | None) -> float:
    """Return the scale, by default D^-1/2; raise ValueError that names what is not allowed."""
    if form not in FORMS:
        raise UserError(f"form: {form!r} is not allowed; {nearest(str(form), list(FORMS))}")
    for name, window in (("window1", window1), ("window2", window2)):
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise UserError(f"{name}: {window!r} is not allowed; give a whole number of at least 1")
    least = 3 if form == "determinant" else 1
    if width < least:
        raise UserError(f"form: {form} needs a head width of at least {least}, q has {width}")
    if scale is None:
        return width**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale: {scale!r} is not allowed; give a finite number, or None for D^-1/2")
    return float(scale)


def widen(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in the precision of the softmax: float64 stays, everything else becomes float32."""
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [tensor.to(wide) for tensor in tensors]


def determinant_as_trilinear_query(q: Tensor) -> Tensor:
    """Return the wider query (..., D + 3 * (D // 3)) that goes with `determinant_as_trilinear_keys`."""
    whole, rest = _split(q)
    return _join(whole, -whole, rest)


def determinant_as_trilinear_keys(k1: Tensor, k2: Tensor) -> tuple[Tensor, Tensor]:
    """Return wider keys whose trilinear products with the wider query are the determinants."""
    (whole1, rest1), (whole2, rest2) = _split(k1), _split(k2)
    wide1 = _join(whole1.roll(-1, -1), whole1.roll(1, -1), rest1)
    return wide1, _join(whole2.roll(1, -1), whole2.roll(-1, -1), rest2)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    triples = x.shape[-1] // 3
    return x[..., : 3 * triples].unflatten(-1, (triples, 3)), x[..., 3 * triples :]


def _join(first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
    return torch.cat((first.flatten(-2), second.flatten(-2), rest), dim=-1)
