"""What operators ask of their arguments before anything else; ValueError names the argument and what it was."""

from typing import Any

import torch
from torch import Tensor

# Of what counts or names something; a bool or a complex number does neither.
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensors(**arguments: Any) -> None:
    """Raise ValueError for an argument that is no tensor."""
    for name, given in arguments.items():
        if not isinstance(given, Tensor):
            shown = repr(given) if given is None or isinstance(given, int | float | str) else type(given).__name__
            raise ValueError(f"{name}: {shown} is not allowed; give a tensor")


def check_groups(heads: int, kv_heads: int) -> None:
    """Raise ValueError unless each key/value head of k1 has as many query heads as the others."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q: {heads} heads are not a multiple of the {kv_heads} key/value heads of k1")
