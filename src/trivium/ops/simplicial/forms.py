"""What the fast backends share: precision, biases and the determinant form as a trilinear one of twice the width."""

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in the precision of the softmax: float64 stays, everything else becomes float32."""
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [tensor.to(wide) for tensor in tensors]


def determinant_as_trilinear(q: Tensor, k1: Tensor, k2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return wider q, k1, k2 whose trilinear products are the determinants (arXiv 2507.02754, section 5).

    det[q; a; b] = <q, (a2,a3,a1), (b3,b1,b2)> - <q, (a3,a1,a2), (b2,b3,b1)>; the D mod 3 channels left over are
    trilinear already.
    """
    triples = q.shape[-1] // 3

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : 3 * triples].unflatten(-1, (triples, 3)), x[..., 3 * triples :]

    def join(first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
        return torch.cat((first.flatten(-2), second.flatten(-2), rest), dim=-1)

    (qs, q_rest), (as_, a_rest), (bs, b_rest) = split(q), split(k1), split(k2)
    return (
        join(qs, -qs, q_rest),
        join(as_.roll(-1, -1), as_.roll(1, -1), a_rest),
        join(bs.roll(1, -1), bs.roll(-1, -1), b_rest),
    )
