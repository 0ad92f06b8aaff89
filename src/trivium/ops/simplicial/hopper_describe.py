"""What the launches of Hopper kernels ask of the device: how many programs fill it, and tiles for its copy engine."""

# Triton's types do not know compile-time layouts.
# pyright: reportArgumentType=false

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from trivium.ops.simplicial.launches import aligned


@functools.cache
def processors(index: int | None) -> int:
    """Return how many multiprocessors a device has."""
    return torch.cuda.get_device_properties(index or 0).multi_processor_count


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def laid_out(*tensors: Tensor) -> Iterator[Tensor]:
    """Yield the tensors contiguous, at addresses that the copy engine takes: multiples of 16."""
    for x in tensors:
        x = x.contiguous()
        yield x if aligned(x) else x.clone()


def described(x: Tensor, *block: int) -> TensorDescriptor:
    """Return a descriptor of x for copies of `block`, one size a dimension of x, into shared memory."""
    return TensorDescriptor.from_tensor(x, list(block), _layout(block, x.dtype))


def reciprocals(most: int, *divisors: int) -> tuple[int, ...]:
    """Return a shift, and m for each divisor: n // divisor is n * m >> shift for all n of a quotient up to `most`.

    A processor's division by a number that it learns at run time takes some 40 instructions.
    """
    shift = 62 - most.bit_length()
    found = [-(-(1 << shift) // divisor) for divisor in divisors]
    # The product is too large by n * (m * divisor - 2^shift) / divisor, which must stay below 2^shift / divisor.
    if any((most + 1) * d * (m * d - (1 << shift)) >= 1 << shift for m, d in zip(found, divisors, strict=True)):
        raise ValueError(f"tiles: {most} rows of up to {max(divisors)} are more than the kernel counts")
    return shift, *found
