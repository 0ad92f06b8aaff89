"""2-simplicial attention (arXiv 2507.02754): every query reads pairs of keys, weighted by a three-way product."""

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.arguments import check_groups, check_tensors
from trivium.ops.documents import checked_documents
from trivium.ops.simplicial import hopper_support as hopper
from trivium.ops.simplicial import triton_support as support
from trivium.ops.simplicial.decode import simplicial_decode
from trivium.ops.simplicial.forms import FORMS, check_numbers

__all__ = ["FORMS", "simplicial_attention", "simplicial_decode"]


def _load_reference():
    from trivium.ops.simplicial.reference import reference

    return reference


def _load_windowed():
    from trivium.ops.simplicial.windowed import windowed

    return windowed


def _load_hopper():
    from trivium.ops.simplicial.hopper_launch import hopper_simplicial

    return hopper_simplicial


def _load_triton():
    from trivium.ops.simplicial.triton_launch import triton_simplicial

    return triton_simplicial


dispatch.register("simplicial", "reference", dispatch.Backend(_load_reference))
dispatch.register(
    "simplicial",
    "torch",
    dispatch.Backend(_load_windowed, suits=lambda device_type: f"plain PyTorch, windowed, runs on {device_type}"),
)

dispatch.register(
    "simplicial",
    "triton",
    dispatch.Backend(
        _load_triton,
        missing=support.missing,
        suits=support.suits,
        refuses=support.refuses,
        remark=support.remark,
    ),
)

dispatch.register(
    "simplicial",
    "hopper",
    dispatch.Backend(
        _load_hopper, missing=hopper.missing, suits=hopper.suits, refuses=hopper.refuses, remark=hopper.remark
    ),
)


def simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor | None,
    *,
    window1: int,
    window2: int,
    scale: float | None = None,
    form: str = "trilinear",
    bias: tuple[Tensor, Tensor] | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return o (B, T, H, D), the softmax over all allowed pairs (j, k) of v1[j] * v2[k].

    q is (B, T, H, D); k1, k2, v1, v2 are (B, T, Hkv, D), and query head h reads key/value head h // (H / Hkv).
    A query i reads i - window1 < j <= i and i - window2 < k <= i. `scale` defaults to D^-1/2. The forms:

    - "trilinear": logits sum_l q[i,l] k1[j,l] k2[k,l] (section 3 of the paper);
    - "determinant": logits sum over triples of channels of det[q; k1; k2], D >= 3 (section 5);
    - "factorized": o[i] = sum_j softmax_j(q.k1) softmax_j(q.k2) v1[j], each softmax over its own window. It has one
      value: v2 must be None, and bias too.

    `bias` is (b_k, b_v), each (Hkv, D), added to k2 and v2. `documents` keep packed documents apart: integer ids
    (B, T), or offsets (n + 1,), of which `trivium.ops.document_ids` makes ids. Softmax and sums run in float32, or
    float64 for float64 inputs. Raises ValueError for arguments that disagree and UserError for a backend that is
    missing.
    """
    scale = _check(q, k1, k2, v1, v2, window1, window2, scale, form, bias)
    documents = checked_documents(documents, q)
    function = dispatch.load(
        "simplicial",
        backend,
        q.device.type,
        (
            ("form", form),
            ("dtype", q.dtype),
            ("width", q.shape[3]),
            ("group", q.shape[2] // k1.shape[2]),
            ("window1", window1),
            ("window2", window2),
            ("bias", bias is not None),
            ("documents", documents is not None),
            ("deterministic", torch.are_deterministic_algorithms_enabled()),
        ),
    )
    if q.numel() == 0:
        every = [x.sum() for x in (q, k1, k2, v1, v2, *(bias or ())) if x is not None]
        return torch.stack(every).sum().to(q.dtype) * torch.zeros_like(q)  # with gradients, of zeros
    with torch.autocast(q.device.type, enabled=False):
        return function(
            q,
            k1,
            k2,
            v1,
            v2,
            window1=window1,
            window2=window2,
            scale=scale,
            form=form,
            bias=bias,
            documents=documents,
        )


def _check(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor | None,
    window1: int,
    window2: int,
    scale: float | None,
    form: str,
    bias: tuple[Tensor, Tensor] | None,
) -> float:
    """Return the scale; raise ValueError that names the argument, what it was and what is allowed."""
    check_tensors(q=q, k1=k1, k2=k2, v1=v1)
    if q.ndim != 4 or k1.ndim != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}, k1: shape {tuple(k1.shape)}; both are (B, T, heads, D)")
    if not q.is_floating_point():
        raise ValueError(f"q: {q.dtype} is not allowed; give a floating-point tensor")
    batch, tokens, heads, width = q.shape
    scale = check_numbers(form, width, window1, window2, scale)
    kv_heads = k1.shape[2]
    check_groups(heads, kv_heads)
    if form == "factorized" and (v2 is not None or bias is not None):
        raise ValueError("form: factorized reads one value; give it as v1, with v2=None and bias=None")
    if form != "factorized" and v2 is None:
        raise ValueError(f"v2: None is allowed in the factorized form alone, not in {form}")
    shapes = {"k1": k1, "k2": k2, "v1": v1} | ({} if v2 is None else {"v2": v2})
    expected = dict.fromkeys(shapes, (batch, tokens, kv_heads, width))
    if bias is not None:
        if not isinstance(bias, tuple | list) or len(bias) != 2:
            count = f"{len(bias)} tensors" if isinstance(bias, tuple | list) else type(bias).__name__
            raise ValueError(f"bias: {count}; give the pair (b_k, b_v)")
        shapes |= {"bias[0]": bias[0], "bias[1]": bias[1]}
        expected |= dict.fromkeys(("bias[0]", "bias[1]"), (kv_heads, width))
    check_tensors(**shapes)
    for name, tensor in shapes.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}; with q {tuple(q.shape)} it must be {expected[name]}"
            )
        # A bias is a parameter, which autocast leaves in float32 beside bfloat16 activations.
        if tensor.dtype != q.dtype and not name.startswith("bias"):
            raise ValueError(f"{name}: {tensor.dtype}, but q is {q.dtype}; all must have one dtype")
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, but q is on {q.device}; all must be on one device")
    return scale
