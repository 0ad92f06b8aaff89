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
