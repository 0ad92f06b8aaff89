"""Cross-entropy over a large vocabulary, straight from the hidden states: logits exist for a few rows at a time.

With 50,257 symbols the logits of a training step are larger than everything else in it. Here the gradients of a chunk
of rows are computed while its logits are at hand, so that they are never kept, and the vocabulary is padded to a
multiple of 64 inside the products, whose kernels need aligned rows. Shapes: N rows, D width, V symbols.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from trivium.ops import dispatch
from trivium.ops.simplicial import triton_support

__all__ = ["LARGE", "vocabulary_loss"]

LARGE = 4096  # symbols from which a training step takes this operator


def vocabulary_loss(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Return sum_n weights[n] * cross_entropy(x[n] @ weight.T, targets[n]) in nats, a float32 scalar.

    Products are made in autocast's dtype where that is on, sums in float32. Gradients flow into `x_ND` and
    `weight_VD` alone, and have no gradients of their own. Backends: "reference" (all logits at once), "torch" and,
    on a GPU, "triton". Raises ValueError for shapes that do not fit and UserError for a backend that is missing.
    """
    rows, width = x_ND.shape
    if weight_VD.shape[1] != width or targets_N.shape != (rows,) or weights_N.shape != (rows,):
        shapes = [tuple(x.shape) for x in (x_ND, weight_VD, targets_N, weights_N)]
        raise ValueError(f"x, weight, targets, weights: expected (N, D), (V, D), (N,), (N,), got {shapes}")
    device = x_ND.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
    elif x_ND.dtype != weight_VD.dtype:
        raise ValueError(f"x and weight: expected one dtype, got {x_ND.dtype} and {weight_VD.dtype}")
    facts = (("dtype", x_ND.dtype), ("device", device))
    return dispatch.load("vocabulary_loss", backend, device, facts)(x_ND, weight_VD, targets_N, weights_N)


def _reference(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    logits_NV = linear(x_ND, weight_VD)
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return (cross_entropy(wide_NV, targets_N, reduction="none") * weights_N).sum()


def _load(kernel: str) -> Callable[[], Callable[..., Tensor]]:
    def load() -> Callable[..., Tensor]:
        from trivium.ops.vocabulary_loss.chunks import chunked

        return lambda *tensors: chunked(*tensors, kernel=kernel)

    return load


def _refuses(facts: Mapping[str, Any]) -> str | None:
    if facts.get("dtype", triton_support.DTYPES[0]) not in triton_support.DTYPES:
        return f"dtype {facts['dtype']}; allowed: bfloat16, float16, float32"
    return None


dispatch.register("vocabulary_loss", "reference", dispatch.Backend(lambda: _reference))
dispatch.register(
    "vocabulary_loss",
    "torch",
    dispatch.Backend(
        _load("torch"), suits=lambda device_type: f"PyTorch's products, some rows at a time ({device_type})"
    ),
)
dispatch.register(
    "vocabulary_loss",
    "triton",
    dispatch.Backend(_load("triton"), missing=triton_support.missing, suits=triton_support.suits, refuses=_refuses),
)
