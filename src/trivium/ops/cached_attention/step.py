"""A step of generation in attention: write one new token a row into the cache, and attend from it to the cache.

Shapes: B rows, S slots of the cache, H query heads, G key/value heads, N = H + 2 G, K head width. Position p of a row
lies in slot p mod S.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.ops import cached_attention as long
from trivium.ops import dispatch
from trivium.ops.native import support as native_support
from trivium.ops.simplicial import triton_support as support

LONGEST = 1024  # slots that one program of a row goes through
# In 16 bits PyTorch's kernels are faster from here on: on an H200, 440 rows that use 300 of 513 slots take them 192 us
# and this one 307 us, where in float32 it is 1,138 us and 180 us (benchmarks/results/scoring_gsm8k.json).
LONG = 128
_ROOM = 4096  # numbers of one slot, all heads, of which a program holds a tile


def cached_step(
    heads_BNK: Tensor,
    keys_BSGK: Tensor,
    values_BSGK: Tensor,
    length_B: Tensor,
    added_B: Tensor | None,
    *,
    held: tuple[int, Tensor | None] | None = None,
    attention_backend: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Return o (B, H, K) of one new token a row, whose queries, keys and values are `heads_BNK`, in this order.

    In place, keys and values go into the cache and `length_B` counts the token, but not in rows where `added_B` (None:
    1 everywhere) is 0; their o is what the token before reads, whatever the cache holds. `held`, if the caller knows
    it, is (leading slots in use, how many of them each row holds, None: all), the new token counted. Without a
    gradient. Backend "torch" calls `cached_attention` with its backend; "native" is one kernel in C, and "triton" one
    for at most LONGEST slots. Raises UserError for a backend that is missing or cannot.
    """
    facts = (
        ("dtype", heads_BNK.dtype),
        ("device", heads_BNK.device.type),
        ("traced", "yes" if torch.compiler.is_compiling() else "no"),
        ("one dtype", "yes" if keys_BSGK.dtype == heads_BNK.dtype else "no"),
        ("gradient", torch.is_grad_enabled()),
        ("fits", "yes" if _fits(keys_BSGK) else "no"),
        ("long", "yes" if keys_BSGK.shape[1] > LONG else "no"),
        ("attention", attention_backend),
    )
    function = dispatch.load("cached_step", backend, heads_BNK.device.type, facts)
    return function(heads_BNK, keys_BSGK, values_BSGK, length_B, added_B, held, attention_backend)


def write_one(ring_BSGK: Tensor, new_BGK: Tensor, length_B: Tensor, added_B: Tensor | None) -> Tensor:
    """Write one new token a row into its slot, in place; rows whose `added_B` is 0 stay as they are."""
    rows_B = torch.arange(ring_BSGK.shape[0], device=ring_BSGK.device)
    slot_B = length_B % ring_BSGK.shape[1]
    if added_B is not None:
        new_BGK = torch.where(added_B[:, None, None] > 0, new_BGK, ring_BSGK[rows_B, slot_B])
    return ring_BSGK.index_put_((rows_B, slot_B), new_BGK.to(ring_BSGK.dtype))


def copy_into(into: Tensor, source: Tensor) -> None:
    """Copy between tensors of one shape and dtype: PyTorch's CUDA kernel for strided ones goes number by number."""
    source, into = wider(source, into) if source.is_cuda else (source, into)
    into.copy_(source)


def wider(source: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as numbers of eight bytes over the same memory, where that can be; else as they are."""
    ratio = 8 // source.element_size()
    apart = [*(x for each in (source, into) for x in (each.storage_offset(), *each.stride()[:-1])), source.shape[-1]]
    if ratio < 2 or any(each % ratio for each in apart) or not source.stride(-1) == into.stride(-1) == 1:
        return source, into
    return source.view(torch.int64), into.view(torch.int64)


def _fits(keys_BSGK: Tensor) -> bool:
    slots, heads, width = keys_BSGK.shape[1:]
    return slots <= LONGEST and _power_of_two(heads) * _power_of_two(width) <= _ROOM


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _by_parts(
    heads_BNK: Tensor,
    keys_BSGK: Tensor,
    values_BSGK: Tensor,
    length_B: Tensor,
    added_B: Tensor | None,
    held: tuple[int, Tensor | None] | None,
    backend: str,
) -> Tensor:
    slots, kv_heads = keys_BSGK.shape[1:3]
    q_BHK, k_BGK, v_BGK = heads_BNK.split((heads_BNK.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    for ring, new in ((keys_BSGK, k_BGK), (values_BSGK, v_BGK)):
        write_one(ring, new.to(ring.dtype), length_B, added_B)
    length_B.add_(1 if added_B is None else added_B)
    used, count_B = (slots, length_B.clamp(1, slots)) if held is None else held
    keys, values = (ring[:, :used].to(q_BHK.dtype) for ring in (keys_BSGK, values_BSGK))
    return long.cached_attention(q_BHK, keys, values, count_B, backend=backend)


def _reference(
    heads_BNK: Tensor,
    keys_BSGK: Tensor,
    values_BSGK: Tensor,
    length_B: Tensor,
    added_B: Tensor | None,
    held: tuple[int, Tensor | None] | None,
    backend: str,
) -> Tensor:
    return _by_parts(heads_BNK, keys_BSGK, values_BSGK, length_B, added_B, held, "reference")


def _load_triton() -> Any:
    from trivium.ops.cached_attention.triton_step import by_triton

    return by_triton


def _load_native() -> Any:
    from trivium.ops.native.step import native

    return native


def _refuses_both(facts: Mapping[str, Any]) -> str | None:
    if facts.get("gradient"):
        return "it has no gradient, and gradients are on"
    if facts.get("attention", "auto") != "auto":
        return f"cached_attention is asked for from {facts['attention']}"
    return "a cache of another dtype" if facts.get("one dtype", "yes") == "no" else None


def _native_refuses(facts: Mapping[str, Any]) -> str | None:
    if facts.get("traced", "no") == "yes":
        return "torch.compile cannot look into it"
    return _refuses_both(facts) or native_support.refuses(facts)


def _refuses(facts: Mapping[str, Any]) -> str | None:
    named = _refuses_both(facts)
    if named is not None:
        return named
    if facts.get("dtype", support.DTYPES[0]) not in support.DTYPES:
        return f"dtype {facts['dtype']}; allowed: bfloat16, float16, float32"
    if facts.get("fits", "yes") == "no":
        return f"more than {LONGEST} slots, or slots too wide to hold a tile of them"
    return None


def _slower(facts: Mapping[str, Any]) -> str | None:
    narrow = facts.get("dtype") in (torch.bfloat16, torch.float16)
    return f"more than {LONG} slots of {facts['dtype']}" if narrow and facts.get("long") == "yes" else None


dispatch.register("cached_step", "reference", dispatch.Backend(lambda: _reference))
dispatch.register(
    "cached_step",
    "torch",
    dispatch.Backend(lambda: _by_parts, suits=lambda device_type: f"the operator cached_attention on {device_type}"),
)
dispatch.register(
    "cached_step",
    "native",
    dispatch.Backend(_load_native, missing=native_support.missing, suits=native_support.suits, refuses=_native_refuses),
)
dispatch.register(
    "cached_step",
    "triton",
    dispatch.Backend(_load_triton, missing=support.missing, suits=support.suits, refuses=_refuses, slower=_slower),
)
