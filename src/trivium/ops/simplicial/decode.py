"""2-simplicial attention of the newest tokens over ring buffers of their windows: what generation calls each token.

Shapes: B rows, T newest tokens, H query heads, G key/value heads, D head width, C slots of a ring. Position p of a row
lies in slot p mod C, so that a ring holds the last C positions; softmax does not care in which order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.arguments import WHOLE, check_groups, check_tensors
from trivium.ops.native import support as native_support
from trivium.ops.simplicial import decode_support as support
from trivium.ops.simplicial import hopper_support, triton_support
from trivium.ops.simplicial.forms import check_numbers


def _load_reference():
    from trivium.ops.simplicial.rings import ring_reference

    return ring_reference


def _load_torch():
    from trivium.ops.simplicial.rings import ring_simplicial

    return ring_simplicial


def _load_triton():
    from trivium.ops.simplicial.decode_launch import triton_decode

    return triton_decode


def _load_hopper():
    from trivium.ops.simplicial.hopper_decode_launch import hopper_decode

    return hopper_decode


def _load_native():
    from trivium.ops.native.simplicial import native

    return native


def _native_refuses(facts: Mapping[str, Any]) -> str | None:
    for name, allowed in (("form", "trilinear"), ("tokens", 1), ("gradients", False)):
        if facts.get(name, allowed) != allowed:
            return f"it steps one token of the trilinear form without gradients; {name} is {facts[name]}"
    if str(facts.get("dtype")) == "torch.bfloat16":
        return "it computes in float32 or float64"
    return native_support.refuses(facts)


dispatch.register("simplicial_decode", "reference", dispatch.Backend(_load_reference))
dispatch.register(
    "simplicial_decode",
    "torch",
    dispatch.Backend(_load_torch, suits=lambda device_type: f"plain PyTorch, runs on {device_type}"),
)
dispatch.register(
    "simplicial_decode",
    "native",
    dispatch.Backend(_load_native, missing=native_support.missing, suits=native_support.suits, refuses=_native_refuses),
)
dispatch.register(
    "simplicial_decode",
    "triton",
    dispatch.Backend(
        _load_triton,
        missing=triton_support.missing,
        suits=triton_support.suits,
        refuses=support.triton_refuses,
    ),
)
dispatch.register(
    "simplicial_decode",
    "hopper",
    dispatch.Backend(
        _load_hopper,
        missing=hopper_support.missing,
        suits=lambda device_type: "a Hopper kernel" if device_type == "cuda" else None,
        refuses=support.hopper_refuses,
    ),
)


def simplicial_decode(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor | None,
    lengths: Tensor,
    *,
    window1: int,
    window2: int,
    scale: float | None = None,
    form: str = "trilinear",
    backend: str = "auto",
) -> Tensor:
    """Return o (B, T, H, D) of each row's T newest tokens, whose keys and values are in the rings already.

    q is (B, T, H, D); k1, v1 (B, C1, G, D) and k2, v2 (B, C2, G, D) are rings, in which position p of a row lies in
    slot p mod C. `lengths` (B,) counts each row's tokens, the new ones included: query t stands at position
    lengths - T + t and reads what `simplicial_attention` would let it read; one that would stand before the first
    token reads nothing and gives 0. A ring needs window + T - 1 slots, or as many as the longest row has tokens.
    Keys carry their rotation, and k2 and v2 their bias, from when they were written. In the "factorized" form v2 is
    None and v1 may be a ring of its own size.

    Nothing waits for the device, and shapes alone choose the work: a CUDA graph can capture it. Only "torch" and
    "reference" have gradients. Raises ValueError for arguments that disagree and UserError for a missing backend.
    """
    scale = _check(q, k1, k2, v1, v2, lengths, window1, window2, scale, form)
    tokens = q.shape[1]
    tensors = [x for x in (q, k1, k2, v1, v2) if x is not None]
    function = dispatch.load(
        "simplicial_decode",
        backend,
        q.device.type,
        (
            ("form", form),
            ("dtype", q.dtype),
            ("device", q.device.type),
            ("width", q.shape[3]),
            ("group", q.shape[2] // k1.shape[2]),
            ("tokens", min(tokens, 2)),
            ("slots1", k1.shape[1]),
            ("slots2", k2.shape[1]),
            ("older", k1.shape[1] > window1 or k2.shape[1] > window2),
            ("gradients", torch.is_grad_enabled() and any(x.requires_grad for x in tensors)),
        ),
    )
    if q.numel() == 0:
        return torch.zeros_like(q)
    with torch.autocast(q.device.type, enabled=False):
        return function(q, k1, k2, v1, v2, lengths, window1=window1, window2=window2, scale=scale, form=form)


def _check(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor | None,
    lengths: Tensor,
    window1: int,
    window2: int,
    scale: float | None,
    form: str,
) -> float:
    """Return the scale; raise ValueError that names the argument, what it was and what is allowed."""
    check_tensors(q=q, k1=k1, k2=k2, v1=v1, lengths=lengths)
    if q.ndim != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}; it must be (B, tokens, heads, D)")
    scale = check_numbers(form, q.shape[3], window1, window2, scale)
    if (v2 is None) != (form == "factorized"):
        raise ValueError(f"v2: {'None' if v2 is None else 'a tensor'} does not go with form={form!r}")
    rings = {"k1": k1, "k2": k2, "v1": v1} | ({} if v2 is None else {"v2": v2})
    check_tensors(**rings)
    for name, tensor in ({"q": q} | rings).items():
        if tensor.ndim != 4:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; it must be (B, tokens or slots, heads, D)")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}")
    if not q.is_floating_point():
        raise ValueError(f"q: {q.dtype} is not allowed; give a floating-point tensor")
    batch, _, heads, width = q.shape
    kv_heads = k1.shape[2]
    check_groups(heads, kv_heads)
    slots = {"k1": k1.shape[1], "k2": k2.shape[1], "v1": k1.shape[1], "v2": k2.shape[1]}
    if form == "factorized":
        slots["v1"] = v1.shape[1]
    for name, tensor in rings.items():
        expected = (batch, slots[name], kv_heads, width)
        if slots[name] < 1:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; a ring has at least one slot")
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; with q {tuple(q.shape)} it must be {expected}")
    if tuple(lengths.shape) != (batch,) or lengths.dtype not in WHOLE or lengths.device != q.device:
        raise ValueError(
            f"lengths: {lengths.dtype} of shape {tuple(lengths.shape)} on {lengths.device}; "
            f"give integers ({batch},) on {q.device}"
        )
    return scale
