"""Launch Triton kernels again without what Triton derives from their arguments each time, some 20 us of the host's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Kernels at hand, by what they were compiled for. A program of many shapes forgets the oldest.
LIMIT = 1024
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    key: tuple[Any, ...] | None,
    grid: tuple[int, ...],
    *arguments: Any,
    constants: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Launch `kernel` with its first `arguments` in order and the rest by name; `options` are the compiler's.

    Calls with equal `key` (hashable) differ in tensors of equal types alone, whose addresses `aligned` found to be
    multiples of 16. Without a key Triton looks at every argument.
    """
    if key is not None and (found := _compiled.get((id(kernel), *key))) is not None:
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    constants = constants or {}
    compiled = kernel[grid](*arguments, **constants, **options)
    if key is not None and compiled is not None:  # the interpreter compiles nothing
        if len(_compiled) >= LIMIT:
            _compiled.pop(next(iter(_compiled)))
        rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _compiled[(id(kernel), *key)] = compiled, rest


def aligned(*tensors: Tensor | None) -> bool:
    """Return whether all addresses are multiples of 16, for which kernels are compiled."""
    return all(x is None or x.data_ptr() % 16 == 0 for x in tensors)
