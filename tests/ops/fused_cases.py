"""What the tests of fused kernels compute, on a GPU here or in the process in which Triton interprets."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tests.ops.triton_cases import DEVICE, settings


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def make_norm(kind: str, width: int, dtype: torch.dtype) -> nn.Module:
    """Return a norm with weights (and biases) that are not 1 and 0."""
    norm: Any = (nn.LayerNorm if kind == "layernorm" else nn.RMSNorm)(width, eps=1e-5)
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data = 1 + 0.3 * draw(width, dtype=torch.float32, seed=seed + 5)
    return norm.to(dtype).to(DEVICE)


@torch.no_grad()
def linear_errors(
    rows: int, inner: int, outer: int, kind: str, activation: Any, biased: bool, dtype: torch.dtype, backend: str
) -> dict[str, float]:
    """Return the distances of both operators from the float64 formula, relative to its size."""
    from trivium.ops.fused_linear import linear_add, norm_linear

    x, weight = draw(rows, 3, inner, dtype=dtype), draw(outer, inner, dtype=dtype, seed=1) * inner**-0.5
    bias = draw(outer, dtype=dtype, seed=2) if biased else None
    stream, norm = draw(rows, 3, outer, dtype=dtype, seed=3), make_norm(kind, inner, dtype)
    with settings():
        found = {
            "norm_linear": norm_linear(x, norm, weight, bias, activation, backend=backend),
            "linear_add": linear_add(x, weight, bias, stream, backend=backend),
        }
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, stream)]
    x, weight, bias, stream = wide  # type: ignore[assignment]
    wanted = {
        "norm_linear": norm_linear(x, norm.double(), weight, bias, activation, backend="reference"),
        "linear_add": linear_add(x, weight, bias, stream, backend="reference"),
    }
    return {name: float((found[name].double() - y).norm() / y.norm()) for name, y in wanted.items()}


def library_error(*shape: Any) -> float:
    """Return the distance of `norm_linear` in float16 from the formula, where the product is the library's."""
    from trivium.ops.fused_linear import launch

    kept, launch.LIBRARY = launch.LIBRARY, 0
    try:
        return linear_errors(*shape, torch.float16, "triton")["norm_linear"]
    finally:
        launch.LIBRARY = kept


@torch.no_grad()
def feedforward_error(
    rows: int, width: int, hidden: int, kind: str, activation: Any, biased: bool, dtype: torch.dtype, backend: str
) -> float:
    """Return the distance of `norm_feedforward` from the float64 formula, relative to its size."""
    from trivium.ops.fused_linear import norm_feedforward

    x, norm = draw(rows, 3, width, dtype=dtype), make_norm(kind, width, dtype)
    into, back = draw(hidden, width, dtype=dtype, seed=1), draw(width, hidden, dtype=dtype, seed=2)
    biases = [draw(size, dtype=dtype, seed=3) if biased else None for size in (hidden, width)]
    maps = [into * width**-0.5, biases[0], back * hidden**-0.5, biases[1]]
    with settings():
        found = norm_feedforward(x, norm, *maps, activation, backend=backend)
    wide = [None if tensor is None else tensor.double() for tensor in (x, *maps)]
    wanted = norm_feedforward(wide[0], norm.double(), *wide[1:], activation, backend="reference")
    return float((found.double() - wanted).norm() / wanted.norm())


def step_errors_by_head(*arguments: Any) -> dict[str, float]:
    """Return what `step_errors` does, where each key head of a row has a program."""
    from trivium.ops.cached_attention import triton_step

    asked = triton_step.by_head
    triton_step.by_head = lambda rows, slots, width: True
    try:
        return step_errors(*arguments)
    finally:
        triton_step.by_head = asked


@torch.no_grad()
def step_errors(
    rows: int, slots: int, heads: int, kv_heads: int, width: int, masked: bool, dtype: torch.dtype, backend: str
) -> dict[str, float]:
    """Return the distances of what `cached_step` gives and leaves from the float64 formula, over steps in which rows
    stand at different places, some past the end of their ring, some finished; what no row holds is NaN.
    """
    from trivium.ops.cached_attention.step import cached_step

    device = "cpu" if backend == "native" else DEVICE
    length = torch.tensor([[0, slots - 1, slots, 2 * slots + 1, 1][row % 5] for row in range(rows)], device=device)
    rings = [draw(rows, slots, kv_heads, width, dtype=dtype, seed=seed).to(device) for seed in (1, 2)]
    empty = torch.arange(slots, device=device) >= length[:, None].clamp(min=1)
    if backend in ("triton", "native"):  # the mask of the others does not keep a NaN behind a weight of 0 away
        rings = [ring.masked_fill(empty[..., None, None], torch.nan) for ring in rings]
    mine = [ring.clone() for ring in rings]
    theirs = [ring.double().nan_to_num() for ring in rings]
    counts = [length.clone(), length.clone()]
    worst = {"o": 0.0, "keys": 0.0, "values": 0.0, "length": 0.0}
    for step in range(3):
        packed = draw(rows, heads + 2 * kv_heads, width, dtype=dtype, seed=10 + step).to(device)
        added = (torch.arange(rows, device=device) % 3 != step).long() if masked else None
        with settings():
            o = cached_step(packed, *mine, counts[0], added, backend=backend)
        wanted = cached_step(packed.double(), *theirs, counts[1], added, backend="reference")
        pairs = (o, wanted), *((x.nan_to_num(), y) for x, y in zip(mine, theirs, strict=True)), tuple(counts)
        for name, (x, y) in zip(worst, pairs, strict=True):
            worst[name] = max(worst[name], float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-9)))
    return worst


@torch.no_grad()
def attention_errors(
    rows: int,
    tokens: int,
    slots: int,
    heads: int,
    kv_heads: int,
    width: int,
    inner: int,
    kind: str,
    masked: bool,
    window: int | None,
    dtype: torch.dtype,
    backend: str,
    in_one: int | None = None,
) -> dict[str, float]:
    """Return the distances of what `norm_attention` gives and leaves from the float64 formula, over a prompt that finds
    NaN in the cache, of rows of different lengths, and three steps in which some rows are finished.
    """
    from trivium.ops.norm_attention import norm_attention

    norm, outer = make_norm(kind, inner, dtype), (heads + 2 * kv_heads) * width
    weight, bias = draw(outer, inner, dtype=dtype, seed=1) * inner**-0.5, draw(outer, dtype=dtype, seed=2)
    mine = [torch.full((rows, slots, kv_heads, width), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    theirs = [torch.zeros(mine[0].shape, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    counts = [torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    wide = make_norm(kind, inner, dtype).double(), weight.double(), bias.double()
    place_B = torch.arange(rows, device=DEVICE)
    worst = {"o": 0.0, "keys": 0.0, "values": 0.0, "length": 0.0}
    with settings(), nullcontext() if in_one is None else steps_in_one(in_one):
        for step in range(4):
            new = 1 if step else tokens
            x = draw(rows, new, inner, dtype=dtype, seed=10 + step)
            added = (place_B % 3 != step if step else 1 + place_B % new).long() if masked else None
            given = {"window": window, "empty": not step}
            o = norm_attention(x, norm, weight, bias, *mine, counts[0], added, **given, backend=backend)
            wanted = norm_attention(x.double(), *wide, *theirs, counts[1], added, **given, backend="reference")
            read = torch.arange(new, device=DEVICE) < (new if added is None or step else added[:, None])
            o, wanted = (each * read[..., None, None] for each in (o.double(), wanted))
            held = torch.arange(slots, device=DEVICE) < counts[1][:, None]
            rings = [
                (x.nan_to_num() * held[..., None, None], y * held[..., None, None])
                for x, y in zip(mine, theirs, strict=True)
            ]
            for name, (x, y) in zip(worst, ((o, wanted), *rings, tuple(counts)), strict=True):
                error = float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-9))
                worst[name] = max(worst[name], error)
    return worst


@contextmanager
def steps_in_one(rows: int) -> Iterator[None]:
    """Let a step of up to so many rows be one kernel of `norm_attention`, in which a row has more than one tile."""
    from trivium.ops.norm_attention import launch

    names = "STEP_IN_ONE", "STEP_SLOTS", "TILE"
    kept = [getattr(launch, name) for name in names]
    for name, value in zip(names, (rows, 64, 1024), strict=True):
        setattr(launch, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, kept, strict=True):
            setattr(launch, name, value)
