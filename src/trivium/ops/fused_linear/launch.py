"""Launch the kernels of fused linear maps, as operators that torch.compile knows."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trivium.ops.fused_linear import Activation, kernels
from trivium.ops.simplicial.triton_support import interpreted

_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_new": 2}


class _Kernels(NamedTuple):
    """The kernels, whose launch syntax no type checker follows."""

    norm: Any = kernels.norm_kernel
    norm_linear: Any = kernels.norm_linear_kernel
    linear_add: Any = kernels.linear_add_kernel
    norm_feedforward: Any = kernels.norm_feedforward_kernel


# Rows from which on the library's products, the norm written first, beat a kernel that holds whole rows.
LIBRARY = 4096
NORM_TILE = 4096  # numbers of a program that only norms
NARROW = 64  # columns that are few: the logits of few symbols
FEEDFORWARD_ROWS, FEEDFORWARD_PART = 128, 64  # of a program; the part of the hidden numbers that it has at once


class Tiles(NamedTuple):
    """Rows, columns and, in `linear_add`, the part of a row that a program multiplies at once; its column tiles."""

    rows: int
    columns: int
    part: int
    tiles: int
    warps: int
    stages: int


_kernels = _Kernels()
# As timed on an H200: `norm_linear` of 257 to 4096 rows of up to 256 numbers; `linear_add` of so many rows, and of
# more, with up to 512 numbers and with more.
SOME_NORMED = Tiles(64, 128, 256, 1, 8, 1)
SOME_SHORT = Tiles(64, 32, 64, 1, 4, 4)
SOME_LONG = Tiles(64, 32, 128, 1, 4, 3)
MANY_SHORT = Tiles(128, 128, 64, 1, 8, 3)
MANY_LONG = Tiles(128, 128, 64, 1, 8, 3)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_two(count: int) -> int:
    return max(16, 1 << max(count - 1, 0).bit_length())


def norm_linear_tiles(rows: int, inner: int, outer: int, activated: bool = False) -> Tiles:
    """Return the tiles for (rows, inner) times (inner, outer): few rows are spread by their columns, few columns by
    their rows.

    A program holds whole rows of both in shared memory. One column tile in one stage was fastest where it was timed (1,
    12, 1000 and 10,000 rows of 256 numbers on an H200); of 100,000 rows a program goes through all columns, in tiles
    that follow each other in three stages. Others have wide tiles, so that their norms are computed less often.
    """
    padded = _power_of_two(inner)
    if rows <= 256:
        return Tiles(16, 16, padded, 1, 4, 1)
    if outer <= NARROW:
        return Tiles(16 if rows <= 4096 else 32, _power_of_two(outer), padded, 1, 4, 1)
    if rows > 32768 and padded <= 256:
        return Tiles(128, 64, padded, _ceil(outer, 64), 8, 3)
    if rows > 4096 and padded <= 256:
        return Tiles(64, 128, padded, 1, 4, 1) if activated else Tiles(128, 256, padded, 1, 8, 1)
    if padded <= 256:
        return SOME_NORMED._replace(part=padded)
    return Tiles(64, 64 if padded <= 512 else 32, padded, 1, 4, 1)


def linear_add_tiles(rows: int, inner: int, outer: int) -> Tiles:
    """Return the tiles of `linear_add` for such sizes."""
    part = min(256, _power_of_two(inner))
    if rows <= 256:
        return Tiles(16, 16, part, 1, 4, 3)
    short = inner <= 512
    tiles = (SOME_SHORT if short else SOME_LONG) if rows <= 4096 else (MANY_SHORT if short else MANY_LONG)
    return tiles._replace(columns=min(tiles.columns, _power_of_two(outer)), part=min(tiles.part, part))


def _norm(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return norm(x) and, where there is a bias, x + bias."""
    rows, inner, y = x.numel() // x.shape[-1], x.shape[-1], torch.empty_like(x)
    moved = y if bias is None else torch.empty_like(x)
    padded = _power_of_two(inner)
    block = max(1, NORM_TILE // padded)
    _kernels.norm[(_ceil(rows, block),)](
        *(x, gamma, gamma if beta is None else beta, gamma if bias is None else bias, y, moved, rows, eps),
        D=inner,
        BD=padded,
        BM=block,
        CENTRED=beta is not None,
        MOVED=bias is not None,
        num_warps=4,
    )
    return y, moved


def _is_library_size(rows: int, x: Tensor, bias: Tensor | None) -> bool:
    """Say whether PyTorch's product of so many rows is the faster one; it takes a bias of its own dtype alone."""
    return rows > LIBRARY and bias is not None and bias.dtype == x.dtype


def _library_has(activation: int, x: Tensor) -> bool:
    """Say whether a product of PyTorch's may end with this activation: on an NVIDIA GPU with GPT-2's, of 16 bits."""
    return activation == _ACTIVATIONS["gelu_new"] and _has_tanh(x)


def _activated(bias: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    return torch._addmm_activation(bias, h, weight.t(), use_gelu=True)  # pyright: ignore[reportPrivateImportUsage]


def _norm_linear(
    x: Tensor, gamma: Tensor, beta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, activation: int
) -> Tensor:
    rows, inner, outer = x.numel() // x.shape[-1], x.shape[-1], weight.shape[0]
    fits = _is_library_size(rows, x, bias) and outer > NARROW and (not activation or _library_has(activation, x))
    if fits and bias is not None:
        h = _norm(x, gamma, beta, eps)[0].view(rows, inner)
        z = _activated(bias, h, weight) if activation else torch.addmm(bias, h, weight.t())
        return z.view(*x.shape[:-1], outer)
    y = torch.empty(*x.shape[:-1], outer, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tiles = norm_linear_tiles(rows, inner, outer, activation != 0)
    _kernels.norm_linear[(_ceil(rows, tiles.rows), _ceil(outer, tiles.columns * tiles.tiles))](
        *(x, gamma, gamma if beta is None else beta, weight, weight if bias is None else bias, y),
        *(rows, outer, eps),
        D=inner,
        BD=tiles.part,
        BM=tiles.rows,
        BN=tiles.columns,
        TILES=tiles.tiles,
        CENTRED=beta is not None,
        BIASED=bias is not None,
        ACTIVATION=activation,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        QUICK=_has_tanh(x),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


def _norm_feedforward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    into: Tensor,
    into_bias: Tensor | None,
    back: Tensor,
    back_bias: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    rows, inner, hidden = x.numel() // x.shape[-1], x.shape[-1], into.shape[0]
    if _is_library_size(rows, x, into_bias) and _library_has(activation, x) and into_bias is not None:
        h, y = _norm(x, gamma, beta, eps, back_bias)
        y.view(rows, inner).addmm_(_activated(into_bias, h.view(rows, inner), into), back.t())
        return y
    y = torch.empty_like(x)
    if not y.numel():
        return y
    biases = (into if into_bias is None else into_bias), (back if back_bias is None else back_bias)
    _kernels.norm_feedforward[(_ceil(rows, FEEDFORWARD_ROWS),)](
        *(x, gamma, gamma if beta is None else beta, into, biases[0], back, biases[1], y, rows, eps),
        D=inner,
        F=hidden,
        BM=FEEDFORWARD_ROWS,
        BF=FEEDFORWARD_PART,
        CENTRED=beta is not None,
        BIASED=into_bias is not None,
        ACTIVATION=activation,
        QUICK=_has_tanh(x),
        num_warps=8,
        num_stages=2,
    )
    return y


def _has_tanh(x: Tensor) -> bool:
    """Say whether the chip has a tanh of its own that is as exact as the numbers are kept."""
    return x.is_cuda and torch.version.hip is None and x.dtype != torch.float32


def _linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    rows, inner, outer = x.numel() // x.shape[-1], x.shape[-1], weight.shape[0]
    y = torch.empty(stream.shape, dtype=stream.dtype, device=x.device)
    if not y.numel():
        return y
    tiles = linear_add_tiles(rows, inner, outer)
    _kernels.linear_add[(_ceil(rows, tiles.rows), _ceil(outer, tiles.columns))](
        *(x, weight, weight if bias is None else bias, stream, y),
        *(rows, outer),
        D=inner,
        BM=tiles.rows,
        BN=tiles.columns,
        BK=tiles.part,
        BIASED=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


_norm_linear_operator = torch.library.custom_op("trivium::norm_linear", _norm_linear, mutates_args=())
_norm_feedforward_operator = torch.library.custom_op("trivium::norm_feedforward", _norm_feedforward, mutates_args=())
_linear_add_operator = torch.library.custom_op("trivium::linear_add", _linear_add, mutates_args=())


@_norm_linear_operator.register_fake
def _(
    x: Tensor, gamma: Tensor, beta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, activation: int
) -> Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)


@_norm_feedforward_operator.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


@_linear_add_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    return torch.empty(stream.shape, dtype=stream.dtype, device=x.device)


def _check(x: Tensor) -> None:
    if x.device.type == "cpu" and not interpreted():
        raise ValueError("x: on cpu; backend triton needs tensors on a GPU")


def norm_linear(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """Return activation(norm(x) weight^T + bias); arguments as in `ops.fused_linear.norm_linear`."""
    _check(x)
    own: Any = norm
    beta = own.bias if isinstance(norm, nn.LayerNorm) else None
    return _norm_linear_operator(
        *(x.contiguous(), own.weight, beta, weight.contiguous(), bias, own.eps, _ACTIVATIONS[activation])
    )


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    """Return stream + x weight^T + bias; arguments as in `ops.fused_linear.linear_add`."""
    _check(x)
    return _linear_add_operator(x.contiguous(), weight.contiguous(), bias, stream.contiguous())


def norm_feedforward(
    x: Tensor,
    norm: nn.Module,
    into: Tensor,
    into_bias: Tensor | None,
    back: Tensor,
    back_bias: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Return x + activation(norm(x) into^T + bias) back^T + bias; see `ops.fused_linear.norm_feedforward`."""
    _check(x)
    own: Any = norm
    beta = own.bias if isinstance(norm, nn.LayerNorm) else None
    maps = into.contiguous(), into_bias, back.contiguous(), back_bias
    return _norm_feedforward_operator(x.contiguous(), own.weight, beta, *maps, own.eps, _ACTIVATIONS[activation])
