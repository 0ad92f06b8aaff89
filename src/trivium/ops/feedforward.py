"""The feed-forward of a block with GPT-2's GELU: y = gelu(x input^T + input_bias) output^T + output_bias.

Shapes: (..., K) in and out, F hidden width; weights input (F, K) and output (K, F).
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from trivium.ops import dispatch, linear
from trivium.ops.gelu import gelu
from trivium.ops.native import support


def feedforward(
    x: Tensor,
    input: Tensor,
    input_bias: Tensor,
    output: Tensor,
    output_bias: Tensor,
    *,
    stream: Tensor | None = None,
    backend: str = "auto",
    gelu_backend: str = "auto",
    linear_backend: str = "auto",
) -> Tensor:
    """Return y (..., K), under autocast in its dtype; or stream + y, with the residual stream (..., K) that y adds to.

    The backends are "native", which keeps what lies between the two products in the nearer caches, "torch", which calls
    the operators linear and gelu with the backends given, and "reference", which calls their references. With "auto"
    what `linear` leaves to PyTorch is not for "native" either. Raises UserError for a backend that is missing or
    cannot, ValueError for a stream of another shape.
    """
    if stream is not None and stream.shape != x.shape:
        raise ValueError(
            f"feedforward: x is {tuple(x.shape)} and the stream {tuple(stream.shape)}; both need one shape"
        )
    weights = (input, input_bias, output, output_bias)
    if backend == "auto" and linear.is_left_to_pytorch(x):
        return _in_parts(x, *weights, gelu_backend, linear_backend, stream)
    parts = "auto" if gelu_backend == linear_backend == "auto" else "named"
    facts = (*linear.facts(x, input), ("parts", parts))
    return dispatch.load("feedforward", backend, x.device.type, facts)(
        x, *weights, gelu_backend, linear_backend, stream
    )


def _in_parts(
    x: Tensor,
    input: Tensor,
    input_bias: Tensor,
    output: Tensor,
    output_bias: Tensor,
    gelu_by: str,
    linear_by: str,
    stream: Tensor | None,
) -> Tensor:
    hidden = gelu(linear.linear(x, input, input_bias, backend=linear_by), backend=gelu_by)
    y = linear.linear(hidden, output, output_bias, backend=linear_by)
    return y if stream is None else stream + y


def _reference(
    x: Tensor,
    input: Tensor,
    input_bias: Tensor,
    output: Tensor,
    output_bias: Tensor,
    gelu_by: str,
    linear_by: str,
    stream: Tensor | None,
) -> Tensor:
    return _in_parts(x, input, input_bias, output, output_bias, "reference", "reference", stream)


def _refuses(facts: Mapping[str, Any]) -> str | None:
    if facts.get("parts") == "named":
        return "backends of its parts, gelu and linear, are asked for by name"
    return linear.refuses(facts)


def _native() -> Callable[..., Tensor]:
    from trivium.ops.native.feedforward import native

    return lambda x, *given: native(x, *given[:4], stream=given[6])


dispatch.register("feedforward", "reference", dispatch.Backend(lambda: _reference))
dispatch.register(
    "feedforward",
    "torch",
    dispatch.Backend(lambda: _in_parts, suits=lambda device_type: "the operators linear and gelu, one after the other"),
)
dispatch.register(
    "feedforward",
    "native",
    dispatch.Backend(_native, missing=support.missing, suits=support.suits, refuses=_refuses),
)
