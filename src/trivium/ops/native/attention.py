"""Causal attention by the kernels in C, as an operator that autograd and torch.compile know.

Shapes: B rows, T tokens, N queries, H query heads, G key/value heads, K head width. `packed` (B, T, J, K) holds the
keys and values (J = 2 G), behind the queries (J = H + 2 G) where no `query` (N, H, K) comes alone.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from trivium.ops.native.kernels import call, once

_EVERY = 2**62  # a window that nothing reaches past

_Pointer, _Integer = ctypes.c_void_p, ctypes.c_int64
_STRIDES = [(f"{name}_{axis}", _Integer) for name in ("query", "key", "value") for axis in ("token", "head")]


class _Call(ctypes.Structure):
    """`Attention` of attention.h."""

    _fields_ = (
        *((name, _Pointer) for name in ("query", "key", "value")),
        *_STRIDES,
        ("offsets", _Pointer),
        ("places", _Pointer),
        *((name, _Integer) for name in ("rows", "tokens", "heads", "kv_heads", "width", "window")),
        ("scale", ctypes.c_double),
        ("threads", _Integer),
    )


class _Gradients(ctypes.Structure):
    """`Gradients` of attention.h."""

    _fields_ = (*((name, _Pointer) for name in ("query", "key", "value")), *_STRIDES)


def _pointers(packed: Tensor, query: Tensor | None, heads: int) -> tuple[int, ...]:
    """Return the addresses of queries, keys and values, and the strides of their tokens and heads."""
    first = packed.data_ptr()
    token, width = packed.shape[2] * packed.shape[3], packed.shape[3]
    kv_heads = (packed.shape[2] - (heads if query is None else 0)) // 2
    keys = first + (heads * width * packed.element_size() if query is None else 0)
    values = keys + kv_heads * width * packed.element_size()
    queries, query_token = (first, token) if query is None else (query.data_ptr(), heads * width)
    return queries, keys, values, query_token, width, token, width, token, width


def _describe(packed: Tensor, query: Tensor | None, places: Tensor | None, heads: int, window: int) -> tuple[Any, Any]:
    """Return the call's description and what must live as long as it."""
    rows, tokens, kinds, width = packed.shape
    offsets = None
    if places is not None:
        starts = torch.arange(0, (rows + 1) * tokens, tokens) if tokens else torch.zeros(rows + 1, dtype=torch.int64)
        offsets = torch.searchsorted(places, starts)
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(places):
            raise IndexError(f"places: some lie outside the {rows} x {tokens} tokens")
    described = _Call(
        *_pointers(packed, query, heads),
        None if offsets is None else offsets.data_ptr(),
        None if places is None else places.data_ptr(),
        rows,
        tokens,
        heads,
        (kinds - (heads if query is None else 0)) // 2,
        width,
        window,
        width**-0.5,
        torch.get_num_threads(),
    )
    return described, offsets


_library = torch.library.Library("trivium", "FRAGMENT")
_library.define(
    "native_attention(Tensor packed, Tensor? query, Tensor? places, int heads, int window) -> (Tensor, Tensor)"
)
_library.define(
    "native_attention_backward(Tensor grad, Tensor softmaxes, Tensor packed, Tensor? query, Tensor? places, int heads, "
    "int window) -> (Tensor, Tensor)"
)


def _shapes(packed: Tensor, query: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    count = packed.shape[0] * packed.shape[1] if query is None else query.shape[0]
    wide = torch.float64 if packed.dtype == torch.float64 else torch.float32
    return packed.new_empty(count, heads, packed.shape[3]), packed.new_empty(count, heads, 2, dtype=wide)


def _order(places: Tensor | None) -> Tensor | None:
    """Return what sorts the places, or None where they ascend already, as the kernels read them."""
    return None if places is None or bool((places[1:] >= places[:-1]).all()) else places.argsort()


def _forward(
    packed: Tensor, query: Tensor | None, places: Tensor | None, heads: int, window: int
) -> tuple[Tensor, Tensor]:
    order = _order(places)
    if order is not None and query is not None and places is not None:
        out, softmaxes = _forward(packed, query[order], places[order], heads, window)
        return torch.empty_like(out).index_copy_(0, order, out), torch.empty_like(softmaxes).index_copy_(
            0, order, softmaxes
        )
    out, softmaxes = _shapes(packed, query, heads)
    described, offsets = _describe(packed, query, places, heads, window)
    call("attention_forward", packed.dtype, ctypes.addressof(described), out.data_ptr(), softmaxes.data_ptr())
    del offsets
    return out, softmaxes


def _backward(
    grad: Tensor,
    softmaxes: Tensor,
    packed: Tensor,
    query: Tensor | None,
    places: Tensor | None,
    heads: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    order = _order(places)
    if order is not None and query is not None and places is not None:
        grad_packed, grad_query = _backward(
            grad[order], softmaxes[order], packed, query[order], places[order], heads, window
        )
        return grad_packed, torch.empty_like(grad_query).index_copy_(0, order, grad_query)
    grad_packed = torch.empty_like(packed)
    grad_query = grad_packed.new_empty(0) if query is None else torch.empty_like(query)
    described, offsets = _describe(packed, query, places, heads, window)
    gradients = _Gradients(*_pointers(grad_packed, None if query is None else grad_query, heads))
    addresses = (ctypes.addressof(described), grad.data_ptr(), softmaxes.data_ptr(), ctypes.addressof(gradients))
    call("attention_backward", packed.dtype, *addresses)
    del offsets
    return grad_packed, grad_query


_library.impl("native_attention", _forward, "CPU")
_library.impl("native_attention_backward", _backward, "CPU")


@torch.library.register_fake("trivium::native_attention")
def _(packed: Tensor, query: Tensor | None, places: Tensor | None, heads: int, window: int):
    return _shapes(packed, query, heads)


@torch.library.register_fake("trivium::native_attention_backward")
def _(grad: Tensor, softmaxes: Tensor, packed: Tensor, query: Tensor | None, *others: Any):
    return torch.empty_like(packed), packed.new_empty(0) if query is None else torch.empty_like(query)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    packed, query, places, ctx.heads, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], packed, query, places)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    softmaxes, packed, query, places = ctx.saved_tensors
    grads = torch.ops.trivium.native_attention_backward(
        grad.contiguous(), softmaxes, packed, query, places, ctx.heads, ctx.window
    )
    return grads[0], None if query is None else grads[1], None, None, None


torch.library.register_autograd("trivium::native_attention", _differentiate, setup_context=_save, lib=_library)
once("trivium::native_attention_backward", _library)


class _Attention(torch.autograd.Function):
    """The same without what an operator of PyTorch's costs a call, which no one but torch.compile asks for."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, query: Tensor | None, places: Tensor | None, heads: int, window: int
    ) -> Tensor:
        out, softmaxes = _forward(packed, query, places, heads, window)
        ctx.heads, ctx.window = heads, window
        ctx.save_for_backward(softmaxes, packed, query, places)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        softmaxes, packed, query, places = ctx.saved_tensors
        found = _backward(grads[0].contiguous(), softmaxes, packed, query, places, ctx.heads, ctx.window)
        return found[0], None if query is None else found[1], None, None, None


def native(
    x_BTND: Tensor,
    kv_heads: int,
    window: int | None,
    attention_backend: str,
    query_MHD: Tensor | None = None,
    places_M: Tensor | None = None,
) -> Tensor:
    """Return o (B, T, H, D), or (M, H, D); arguments as in `packed_attention`."""
    x_BTND = x_BTND.contiguous()
    heads = x_BTND.shape[2] - 2 * kv_heads if query_MHD is None else query_MHD.shape[1]
    query_MHD = None if query_MHD is None else query_MHD.to(x_BTND.dtype).contiguous()
    places_M = None if places_M is None else places_M.contiguous()
    arguments = (x_BTND, query_MHD, places_M, heads, min(window or _EVERY, _EVERY))
    compiling = torch.compiler.is_compiling()
    out = torch.ops.trivium.native_attention(*arguments)[0] if compiling else _Attention.apply(*arguments)
    return out if query_MHD is not None else out.unflatten(0, x_BTND.shape[:2])
