"""What the tests of the Triton backend compute: on a GPU here, else in a process in which Triton interprets.

TRITON_INTERPRET=1 must stand before Triton is imported and would change the backends of other tests, so that process
is one of its own.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("o", "q", "k1", "k2", "v1", "v2", "b_k", "b_v")


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from triton.runtime import interpreter

    # For every call of one function by another the interpreter looks through triton.language for what it has to
    # replace, a third of the time of these tests; what a launch and the first call from a module replace still stands.
    seen: set[str] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn.__module__ not in seen:
            seen.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call


_pool: ProcessPoolExecutor | None = None


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Give the process in which Triton interprets: one for all test files, since it takes seconds to start."""
    global _pool
    if _pool is None:
        _pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_interpret)
    yield _pool


def end_interpreter() -> None:
    """End the process, if one was started."""
    global _pool
    if _pool is not None:
        _pool.shutdown()
        _pool = None


@contextmanager
def settings(tiles: tuple[int, ...] | None = None, deterministic: bool = False):
    """Set the tiles of all kernels, and put NaN into memory that nobody has written."""
    from trivium.ops.simplicial import triton_launch

    own, empty = triton_launch.tiles_for, torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.empty = poisoned
    if tiles is not None:
        assert tiles[0] * tiles[1] * tiles[2] >= 16, "the matrix unit of a GPU takes no fewer rows"
        triton_launch.tiles_for = lambda kernel, **sizes: triton_launch.Tiles(*tiles)
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.empty, triton_launch.tiles_for = empty, own


def draw(
    rows: int = 2,
    tokens: int = 13,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 5,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    documents: bool = False,
    strided: bool = False,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE).requires_grad_()

    tensors = {"q": normal(rows, tokens, heads, width)}
    tensors |= {name: normal(rows, tokens, kv_heads, width) for name in ("k1", "k2", "v1", "v2")}
    if strided:  # Each tensor in memory of another shape: no stride of one fits another.
        for extra, (name, x) in enumerate(tensors.items()):
            wide = torch.full(
                (rows, tokens + extra, x.shape[2] + extra, width + 8), torch.nan, dtype=dtype, device=DEVICE
            )
            wide[:, :tokens, : x.shape[2], :width] = x.detach()
            tensors[name] = wide[:, :tokens, : x.shape[2], :width].requires_grad_()
    pair = (normal(kv_heads, width), normal(kv_heads, width)) if bias else None
    ids = None
    if documents:
        ids = (torch.arange(tokens) * 3 // tokens + torch.arange(rows)[:, None]).to(DEVICE)
    return tensors | {"bias": pair, "documents": ids}


def results(arguments: dict[str, Any], double: bool = False, **options: Any) -> list[Tensor]:
    """Return o and every gradient."""
    from trivium.ops import simplicial_attention

    tensors = [arguments[name] for name in NAMES[1:6]] + list(arguments["bias"] or ())
    if double:
        tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    bias = (tensors[5], tensors[6]) if arguments["bias"] else None
    o = simplicial_attention(*tensors[:5], bias=bias, documents=arguments["documents"], **options)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(9)).to(o.device, o.dtype)
    return [o.detach(), *torch.autograd.grad(o, tensors, weights)]


def compared(
    arguments: dict[str, Any],
    tiles: tuple[int, ...] | None = None,
    deterministic: bool = False,
    against: str = "reference",
    **options: Any,
) -> tuple[list[Tensor], dict[str, float]]:
    """Return o and the gradients, and each one's distance from the float64 reference, relative to its size or to 1."""
    with settings(tiles, deterministic):
        found = results(arguments, backend="triton", **options)
    wanted = results(arguments, double=True, backend=against, **options)
    return found, {
        name: float((x.double() - y).norm() / y.norm().clamp_min(1))
        for name, x, y in zip(NAMES, found, wanted, strict=False)
    }


def errors(draws: dict[str, Any], *arguments: Any, **options: Any) -> dict[str, float]:
    """Return the distances of `compared` alone."""
    return compared(draw(**draws), *arguments, **options)[1]


def same_bits_and_errors(
    draws: dict[str, Any], tiles: tuple[int, ...] | None, **options: Any
) -> tuple[bool, dict[str, float]]:
    """Return whether two deterministic passes give the same bits, and the errors of the second."""
    arguments = draw(**draws)
    with settings(tiles, deterministic=True):
        first = results(arguments, backend="triton", **options)
    second, distances = compared(arguments, tiles, deterministic=True, **options)
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True)), distances


def choice_and_reason(deterministic: bool) -> dict[str, str]:
    from trivium.ops import dispatch

    with settings(None, deterministic):
        results(draw(tokens=2, rows=1), window1=2, window2=1, backend="triton")
    return dispatch.chosen()["simplicial"]


def log_sums(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the saved log-sum-exp, and what it should be, in float64."""
    from trivium.ops.simplicial import triton_launch

    a = {
        name: x.detach()
        for name, x in draw(rows=2, tokens=6, heads=2, kv_heads=2, width=4, dtype=dtype).items()
        if name in NAMES
    }
    with settings():
        lse = triton_launch.forward(a["q"], a["k1"], a["v1"], a["k2"], a["v2"], None, 4, 2, 0.5, 0)[1]
    logits = torch.einsum(
        "bihd,bjhd,bkhd->bhijk", *(0.5**x * a[n].double() for n, x in (("q", 1), ("k1", 0), ("k2", 0)))
    )
    i, j = torch.arange(6, device=DEVICE)[:, None], torch.arange(6, device=DEVICE)
    far, near = ((j <= i) & (j > i - window) for window in (4, 2))
    allowed = far[:, :, None] & near[:, None, :]
    return lse.cpu(), logits.masked_fill(~allowed, -torch.inf).flatten(-2).logsumexp(-1).cpu()


def reads(changed: str, window1: int, window2: int) -> list[list[int]]:
    """Return for each token which tokens of `changed` move its output."""
    from trivium.ops import simplicial_attention

    a = {name: x for name, x in draw(rows=1, tokens=7, heads=1, kv_heads=1, width=3).items() if name in NAMES}
    with settings(), torch.no_grad():
        before = simplicial_attention(**a, window1=window1, window2=window2, backend="triton")
        found: list[list[int]] = [[] for _ in range(7)]
        for token in range(7):
            other = a[changed].detach().clone()
            other[:, token] += 1
            after = simplicial_attention(**(a | {changed: other}), window1=window1, window2=window2, backend="triton")
            for i in (before != after).any(-1).flatten().nonzero().flatten().tolist():
                found[i].append(token)
    return found


def heads_moved_by(kv_head: int) -> list[int]:
    """Return the query heads of 6 whose output changes with the keys and values of one key/value head of 3."""
    from trivium.ops import simplicial_attention

    a = {name: x.detach() for name, x in draw(rows=1, tokens=5, heads=6, kv_heads=3).items() if name in NAMES}
    others = {name: x.clone() for name, x in a.items()}
    for name in ("k1", "k2", "v1", "v2"):
        others[name][:, :, kv_head] += 1
    with settings():
        first, second = (simplicial_attention(**x, window1=3, window2=2, backend="triton") for x in (a, others))
    return (first != second).any(-1).any(1)[0].nonzero().flatten().tolist()


def slopes(name: str) -> tuple[float, float]:
    """Return the slope of a sum of outputs along a direction of one input, by its gradient and by a difference."""
    from trivium.ops import simplicial_attention

    a = {key: x for key, x in draw(rows=1, tokens=6, heads=2, kv_heads=1).items() if key in NAMES}
    generator = torch.Generator().manual_seed(7)
    weights, along = (torch.randn(a[key].shape, generator=generator).to(DEVICE) for key in ("q", name))

    def value(**changed: Tensor) -> Tensor:
        return (simplicial_attention(**(a | changed), window1=4, window2=2, backend="triton") * weights).sum()

    (gradient,) = torch.autograd.grad(value(), a[name])
    with torch.no_grad():
        step = 1e-2
        difference = (value(**{name: a[name] + step * along}) - value(**{name: a[name] - step * along})) / (2 * step)
    return float((gradient * along).sum()), float(difference)


def check_registration(documents: bool, form: str) -> None:
    """Raise what torch.library.opcheck finds wrong."""
    from trivium.ops.simplicial import triton_launch

    a = draw(rows=1, tokens=3, heads=2, kv_heads=1, width=4, documents=documents)
    sign = {"trilinear": 0, "determinant": -1}[form]
    arguments = (a["q"], a["k1"], a["v1"], a["k2"], a["v2"], a["documents"], 3, 2, 0.5, sign)
    torch.library.opcheck(triton_launch._forward.op, arguments)
    o, lse = triton_launch.forward(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))  # pyright: ignore
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(triton_launch._backward.op, (torch.ones_like(o), *plain[:6], o, lse, *plain[6:], False))


def checkpointed_and_in_autocast() -> list[tuple[Tensor, Tensor]]:
    """Return gradients beside those of the plain call: checkpointed, and inside autocast, which must not narrow."""
    from torch.utils.checkpoint import checkpoint

    from trivium.ops import simplicial_attention

    a = {name: x for name, x in draw(rows=1, tokens=5).items() if name in NAMES}
    options: dict[str, Any] = {"window1": 3, "window2": 2, "backend": "triton"}

    def attend(*tensors: Tensor) -> Tensor:
        return simplicial_attention(*tensors, **options)  # pyright: ignore[reportArgumentType]

    plain = torch.autograd.grad(attend(*a.values()).square().sum(), list(a.values()))
    again = torch.autograd.grad(checkpoint(attend, *a.values(), use_reentrant=False).square().sum(), list(a.values()))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        narrow = torch.autograd.grad(attend(*a.values()).square().sum(), list(a.values()))
    return [(x.cpu(), y.cpu()) for found in (again, narrow) for x, y in zip(found, plain, strict=True)]


def refusal(change: str) -> str:
    """Return what the error says of a call that the backend cannot serve."""
    from trivium.ops import simplicial_attention

    a = {name: x.detach() for name, x in draw(rows=1, tokens=4, width=6).items() if name in NAMES}
    options: dict[str, Any] = {"window1": 2, "window2": 2, "backend": "triton"}
    if change == "dtype":
        a = {name: x.double() for name, x in a.items()}
    elif change == "form":
        options["form"] = "factorized"
        a["v2"] = None  # pyright: ignore[reportArgumentType]
    elif change == "width":
        a = {name: x.repeat(1, 1, 1, 64) for name, x in a.items()}
    elif change == "stride":
        a["k1"] = a["k1"].transpose(1, 3).contiguous().transpose(1, 3)
    try:
        simplicial_attention(**a, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def empty_outputs() -> list[tuple[int, ...]]:
    from trivium.ops import simplicial_attention

    found: list[tuple[int, ...]] = []
    for rows, tokens in ((0, 3), (2, 0)):
        a = {name: x for name, x in draw(rows=rows, tokens=tokens).items() if name in NAMES}
        found.append(tuple(simplicial_attention(**a, window1=2, window2=2, backend="triton").shape))
    return found


def call(pool: ProcessPoolExecutor | None, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options) if pool is None else pool.submit(function, *arguments, **options).result()


def packed_errors(
    tokens: int, heads: int, kv_heads: int, width: int, window: int | None, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Return the distance of packed attention and of its gradient from the float64 formula, relative to their size."""
    from trivium.ops.packed_attention import packed_attention

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, tokens, heads + 2 * kv_heads, width, generator=generator).to(dtype).to(DEVICE).requires_grad_()
    wide = x.detach().double().requires_grad_()
    weights = torch.randn(3, tokens, heads, width, generator=generator).to(DEVICE)
    with settings():
        o = packed_attention(x, kv_heads, window, backend="triton")
        (dx,) = torch.autograd.grad(o, x, weights.to(dtype))
    wanted = packed_attention(wide, kv_heads, window, attention_backend="reference", backend="torch")
    (dwide,) = torch.autograd.grad(wanted, wide, weights.double())
    pairs = {"o": (o.detach().double(), wanted.detach()), "x": (dx.double(), dwide)}
    return {name: float((found - true).norm() / true.norm()) for name, (found, true) in pairs.items()}


def loss_errors(
    rows: int, width: int, symbols: int, dtype: torch.dtype = torch.float32, backend: str = "triton", spread: float = 0
) -> dict[str, float]:
    """Return the distance of the loss over a vocabulary and of its gradients from the float64 formula, for logits whose
    standard deviation is `spread` (0: the root of the width).
    """
    from trivium.ops.vocabulary_loss import vocabulary_loss

    if not GPU and backend == "triton":
        from trivium.ops.vocabulary_loss import kernels

        kernels.BLOCK = 64  # several turns of the loop over the symbols
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, width, generator=generator) for n in (rows, symbols))
    x, weight = (each.to(dtype).to(DEVICE) for each in (x, weight * (spread * width**-0.5 or 1.0)))
    targets = torch.randint(symbols, (rows,), generator=generator).to(DEVICE)
    weights = torch.rand(rows, generator=generator).to(DEVICE)
    weights[1::3] = 0
    x, weight = x.requires_grad_(), weight.requires_grad_()
    wide = [each.detach().double().requires_grad_() for each in (x, weight)]
    with settings():
        loss = vocabulary_loss(x, weight, targets, weights, backend=backend) / 3
        found = [loss.detach(), *torch.autograd.grad(loss, (x, weight))]
    true_loss = vocabulary_loss(*wide, targets, weights.double(), backend="reference") / 3
    wanted = [true_loss.detach(), *torch.autograd.grad(true_loss, wide)]
    pairs = zip(("loss", "x", "weight"), found, wanted, strict=True)
    return {name: float((mine.double() - true).norm() / true.norm()) for name, mine, true in pairs}
