"""What the operators with a running state share: their call, their backends, and packed documents.

Shapes: B rows, T tokens, H heads, K key width, V value width.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.arguments import check_tensors
from trivium.ops.documents import checked_documents

FLA = "flash-linear-attention"
MENDED = "triton 3.7.1 or later (torch 2.13 brings it)"  # for gradients of a gated rule on a Hopper GPU


Loader = Callable[[], Callable[..., tuple[Tensor, Tensor]]]


def register(
    operator: str,
    load_reference: Loader,
    load_chunked: Loader,
    load_fla: Loader,
    refuses: Callable[[Mapping[str, Any]], str | None],
    lacks: Callable[[], str | None] = lambda: None,
    slower: Callable[[Mapping[str, Any]], str | None] = lambda facts: None,
) -> None:
    """Register the backends of an operator, from functions that import and return them.

    `refuses`, `lacks` and `slower` are those of fla.
    """

    def suits(device_type: str) -> str:
        return f"plain PyTorch, chunked, runs on {device_type}"

    dispatch.register(operator, "reference", dispatch.Backend(load_reference))
    dispatch.register(operator, "torch", dispatch.Backend(load_chunked, suits=suits))
    says = {"refuses": refuses, "slower": slower, "remark": fla_remarks, "lacks": lacks}
    fla = dispatch.Backend(load_fla, missing=fla_missing, suits=fla_suits, **says)
    dispatch.register(operator, "fla", fla)


def compute(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, tuple[Tensor, tuple[int, ...]]],
    *,
    scale: float | None,
    state: Tensor | None,
    documents: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return (o, state) of the operator's backend, its arguments checked and its defaults filled in.

    `gates` maps what else it takes to (tensor, the shape that this must have), in the order of its arguments.
    """
    check_recurrence(q, k, v, gates, state)
    documents = checked_documents(documents, q)
    given = (q, k, v, state, *(gate for gate, _ in gates.values()))
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    facts = (("dtype", q.dtype), ("device", q.device.type), ("gradients", gradients))
    function = dispatch.load(operator, backend, q.device.type, facts)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # of sums and states
    if state is None:
        state = torch.zeros(q.shape[0], *q.shape[2:], v.shape[3], dtype=wide, device=q.device)
    if v.numel() == 0:
        return torch.zeros_like(v), state.to(wide)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    tensors = (q, k, v, *(gate for gate, _ in gates.values()))
    with torch.autocast(q.device.type, enabled=False):
        return function(*tensors, scale=scale, state=state.to(wide), documents=documents)


def check_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, tuple[Tensor, tuple[int, ...]]],
    state: Tensor | None,
) -> None:
    """Raise ValueError that names the argument, what it was and what is allowed; `gates` maps to (tensor, shape)."""
    check_tensors(q=q, k=k, v=v, **{name: gate for name, (gate, _) in gates.items()})
    if state is not None:
        check_tensors(state=state)
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}, v: shape {tuple(v.shape)}; give (B, T, H, K) and (B, T, H, V)")
    batch, tokens, heads, width = q.shape
    expected = {"q": (q, tuple(q.shape)), "k": (k, tuple(q.shape)), "v": (v, (batch, tokens, heads, v.shape[3]))}
    expected |= gates
    if state is not None:
        expected["state"] = (state, (batch, heads, width, v.shape[3]))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; with q {tuple(q.shape)} it must be {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {tensor.dtype} is not allowed; give a floating-point tensor")
        if name in ("k", "v") and tensor.dtype != q.dtype:
            raise ValueError(f"{name}: {tensor.dtype}, but q is {q.dtype}; all must have one dtype")
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, but q is on {q.device}; all must be on one device")


def restarts(documents_BT: Tensor) -> Tensor:
    """Return (B, T) bool: where the document id differs from that of the token before; never at a row's beginning."""
    starts_BT = torch.zeros_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return starts_BT


def forget_between(log_decay: Tensor, documents_BT: Tensor | None) -> Tensor:
    """Return `log_decay` (B, T, ...) with -inf where a document begins: exp(-inf) = 0 forgets what came before."""
    if documents_BT is None:
        return log_decay
    starts_BT = restarts(documents_BT)
    return log_decay.masked_fill(starts_BT.view(*starts_BT.shape, *[1] * (log_decay.ndim - 2)), -torch.inf)


def document_bounds(documents_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (bounds, first, last) of the documents of all rows laid end to end, as kernels for packed rows want them.

    Document n holds the flattened tokens bounds[n] up to bounds[n + 1]; row b's documents are first[b] to last[b].
    """
    starts_BT = restarts(documents_BT)
    starts_BT[:, 0] = True
    begins_N = starts_BT.flatten().nonzero()[:, 0]
    bounds = torch.cat((begins_N, begins_N.new_tensor([starts_BT.numel()])))
    per_row_B = starts_BT.sum(dim=1)
    last_B = per_row_B.cumsum(0) - 1
    return bounds, last_B - per_row_B + 1, last_B


def in_packed_rows(
    kernel: Callable[[list[Tensor], Tensor, Tensor | None], tuple[Tensor, Tensor]],
    tensors: list[Tensor],
    state_BHKV: Tensor,
    documents_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what kernel(tensors, state, bounds) gives, with every document a sequence of its own in one packed row.

    A row's first document begins from its state, the others from zero; the state of its last one comes back.
    """
    if tensors[0].dtype == torch.float32 and not torch.compiler.is_compiling():
        exact_float32()
    tensors = [tensor.contiguous() for tensor in tensors]
    if documents_BT is None:
        return kernel(tensors, state_BHKV.contiguous(), None)
    bounds, first_B, last_B = document_bounds(documents_BT)
    start = state_BHKV.new_zeros(len(bounds) - 1, *state_BHKV.shape[1:]).index_copy(0, first_B, state_BHKV)
    o, final = kernel([tensor.flatten(0, 1)[None] for tensor in tensors], start, bounds)
    return o[0].unflatten(0, documents_BT.shape), final.index_select(0, last_B)


def import_fla(name: str) -> ModuleType:
    """Import a module of flash-linear-attention; two warnings of the way there that concern no user raise nothing.

    fla decorates functions with torch.compile, and torch 2.11's compiler then loads scripted classes of its own, which
    torch deprecates; and fla says that other layers of its would like flash-attn.
    """
    if name in sys.modules:
        return sys.modules[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is", DeprecationWarning)
        warnings.filterwarnings("ignore", "Flash Attention is not installed", ImportWarning)
        return import_module(name)


def exact_float32() -> None:
    """Let Triton's products of float32 be float32, unless the user wants them rounded (`TRITON_F32_DEFAULT`, or
    PyTorch's own `set_float32_matmul_precision`). fla's kernels leave it to Triton, which rounds to 10 bits (TF32).
    """
    if wants_exact_float32():
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def wants_exact_float32() -> bool:
    """Say whether PyTorch's precision and the user's TRITON_F32_DEFAULT leave products of float32 exact."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return exact and os.environ.get("TRITON_F32_DEFAULT", "ieee") == "ieee"


def fla_remarks(facts: Mapping[str, Any]) -> str | None:
    """Say what of a call by flash-linear-attention's kernels a reader of the record should know, or return None."""
    if facts.get("dtype") != torch.float32:
        return None
    return "float32 products by Triton's TRITON_F32_DEFAULT, set to ieee where PyTorch's precision is 'highest'"


def fla_missing() -> str | None:
    """Say why flash-linear-attention's kernels cannot run on this machine, or return None."""
    try:
        found = version(FLA)
    except PackageNotFoundError:
        return f"{FLA} is not installed: pip install '{FLA}[cuda]>=0.6'"
    if tuple(int(part) for part in found.split(".")[:2]) < (0, 6):
        return f"{FLA} {found} is too old: pip install '{FLA}[cuda]>=0.6'"
    return None if torch.cuda.is_available() else f"{FLA} needs a CUDA device, and torch sees none"


def fla_suits(device_type: str) -> str | None:
    """Say why "auto" takes flash-linear-attention's kernels on a device type; None where they don't run."""
    return "flash-linear-attention's kernels" if device_type == "cuda" else None


def fla_refuses(facts: Mapping[str, Any]) -> str | None:
    """Say why flash-linear-attention's kernels cannot serve a call, or return None."""
    if facts.get("device", "cuda") != "cuda":
        return f"it computes on CUDA devices, the inputs are on {facts['device']}"
    return "it computes in float32 or less, the inputs are float64" if facts.get("dtype") == torch.float64 else None


def fla_backward_refuses(facts: Mapping[str, Any]) -> str | None:
    """Say why the kernels of a gated rule cannot serve a call that wants gradients, or any, or return None."""
    why = fla_refuses(facts)
    if why is not None or not facts.get("gradients"):
        return why
    why = fla_backward_lacks()
    if why is None and facts.get("dtype") == torch.float32 and wants_exact_float32() and takes_tilelang():
        return (
            "tilelang, by which it computes gradients here, rounds products of float32 to TF32: set FLA_TILELANG=0 (on "
            f"a Hopper GPU with {MENDED})"
        )
    return why


def fla_backward_lacks() -> str | None:
    """Say why the kernels of a gated rule give no gradients on this machine and what to install for it, or return None.

    fla 0.6 itself raises in that backward pass: on Hopper Triton 3.4.0 to 3.7.0 compiles it into wrong results.
    """
    if not on_hopper():
        return None
    found = version("triton")
    if not (3, 4, 0) <= release_of(found) < (3, 7, 1) or takes_tilelang():
        return None
    return f"no gradients on a Hopper GPU by Triton {found}, which compiles them wrongly: install {MENDED}"


def fla_backward_slower(facts: Mapping[str, Any]) -> str | None:
    """Say why "auto" leaves a call of a gated rule to the chunked form in PyTorch, or return None.

    Of exact float32 products Triton makes so many instructions that they spill: 112 ms for 11 on an H200.
    """
    if not facts.get("gradients") or facts.get("dtype") != torch.float32 or not wants_exact_float32():
        return None
    return "its gradients of exact float32 products take ten times as long, on an H200, and a minute to compile"


def takes_tilelang() -> bool:
    """Say whether fla computes the gradients of a gated rule by tilelang, as it does on a Hopper GPU where it can."""
    by_default = "1" if on_hopper() and release_of(version("triton")) >= (3, 4, 0) else "0"
    allowed = os.environ.get("FLA_TILELANG", by_default) != "0"
    if not allowed or os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1" or find_spec("tilelang") is None:
        return False
    try:
        return import_fla("fla.utils").has_usable_nvcc()
    except ImportError:  # a tilelang that cannot be imported: fla then cannot either, and tells why where it is used
        return False


def on_hopper() -> bool:
    """Say whether the current CUDA device is of the generation of the H100 and H200."""
    return torch.cuda.get_device_capability()[0] == 9


def release_of(found: str) -> tuple[int, ...]:
    """Return the first three numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", found)[:3])
