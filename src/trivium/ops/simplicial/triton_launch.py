"""Launch the Triton kernels of 2-simplicial attention, as operators that torch.compile and autograd know.

Tile sizes follow from the shape alone, not from timing runs: the same call always rounds alike, and nothing waits for
a search. `tiles_for` holds what measurements on an H200 favoured.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trivium.ops.simplicial import operators, triton_backward, triton_forward, triton_sums
from trivium.ops.simplicial.launches import aligned, launch
from trivium.ops.simplicial.triton_support import interpreted

# Bytes of the deterministic backward's workspace at a time; more rows and heads are done one after the other.
WORKSPACE = 2**28
# Programs that keep a GPU busy. A constant, so that sums are split alike on every GPU.
PROGRAMS = 256


class _Kernels(NamedTuple):
    """The kernels, whose launch syntax no type checker follows."""

    forward_kernel: Any = triton_forward.forward_kernel
    delta_kernel: Any = triton_backward.delta_kernel
    rows_kernel: Any = triton_backward.rows_kernel
    long_kernel: Any = triton_backward.long_kernel
    gather_kernel: Any = triton_sums.gather_kernel
    narrow_kernel: Any = triton_sums.narrow_kernel


_kernels = _Kernels()


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


@functools.cache
def adds_tiles(index: int | None) -> bool:
    """Return whether a device has the copy engine that adds whole tiles to memory: Hopper and later."""
    return not interpreted() and torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


def power_of_two(count: int) -> int:
    """Return the least power of two that is no less than `count`."""
    return 1 << max(count - 1, 0).bit_length()


class Tiles(NamedTuple):
    """Queries, heads of a group and short keys whose products are the rows; long keys; warps; pipeline stages.

    `registers` is the most that a thread may take: a multiprocessor runs as many programs as its registers hold.
    """

    queries: int
    heads: int
    short: int
    long: int
    warps: int = 4
    stages: int = 2
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Return what the compiler takes."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and torch.version.hip is None:  # AMD's compiler knows no such option
            found["maxnreg"] = self.registers
        return found


def sizes_for(*, width: int, wide: bool) -> tuple[int, int, int, int]:
    """Return the rows and long keys of a tile, warps and stages of forward kernels, and of all with 4-byte inputs."""
    if wide:
        return (32, 32, 4, 1) if width > 128 else (64, 32, 4, 1)
    return (64, 64, 4, 2) if width > 128 else (128, 64, 8 if width > 64 else 4, 3)


def tiles_for(kernel: str, *, width: int, group: int, short: int, wide: bool, plain: bool = False) -> Tiles:
    """Return the tiles of kernel "forward", "rows" or "long"; `width` is padded, `wide` says 4-byte inputs.

    `plain` is the trilinear form without documents.
    """
    registers = None
    if wide or kernel == "forward":
        rows, long, warps, stages = sizes_for(width=width, wide=wide)
        if not wide and short <= 16 and width <= 64:
            rows, long = 64, 32
    elif kernel == "rows":
        rows, long, warps, stages = (64, 32, 8, 1) if width > 128 else (128, 64, 8, 2)
        if short <= 16 and width <= 64:
            rows, warps = 64, 4
            if plain and width == 32:  # three programs a processor for two: 361 us for 417 at B64 T128 H8, 128 x 16
                registers = 168
    else:
        rows, long, warps, stages = (32, 64, 8, 1) if width > 128 else (64, 128, 8, 1)
    keys = min(power_of_two(short), rows)
    heads = min(group & -group, rows // keys)  # A power of two that divides the group: no row is wasted.
    return Tiles(rows // keys // heads, heads, keys, long, warps, stages, registers)


class _Call(NamedTuple):
    """Sizes of one call."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    long: int
    short: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def padded(self) -> int:
        return max(16, power_of_two(self.width))

    def tiles(self, kernel: str, dtype: torch.dtype, *, plain: bool = False) -> Tiles:
        wide = dtype == torch.float32
        return tiles_for(kernel, width=self.padded, group=self.group, short=self.short, wide=wide, plain=plain)

    def constants(self, tiles: Tiles, sign: int, documents: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "D": self.width,
            "BD": self.padded,
            "BI": tiles.queries,
            "BG": tiles.heads,
            "BK": tiles.short,
            "BN": tiles.long,
            "CHUNKS": _ceil(self.short, tiles.short),
            "SIGN": sign,
            "DOCUMENTS": documents is not None,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        }


def _call(q: Tensor, k_long: Tensor, long: int, short: int) -> _Call:
    rows, tokens, heads, width = q.shape
    return _Call(rows, tokens, heads, k_long.shape[2], width, min(long, tokens), min(short, tokens))


def _edge(tiles: Tiles) -> int:
    return max(16, power_of_two(tiles.queries - 1))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _key(call: _Call, *tensors: Tensor | None, **facts: Any) -> tuple[Any, ...] | None:
    """Return what the kernels of a call are compiled for, or None: see `launch`."""
    if not aligned(*tensors):
        return None
    kinds = tuple(x if x is None else (x.dtype, *x.stride()) for x in tensors)
    device = next(x.device.index for x in tensors if x is not None)
    return (call, kinds, device, *facts.values())


def forward(
    q: Tensor,
    k_long: Tensor,
    v_long: Tensor,
    k_short: Tensor,
    v_short: Tensor,
    documents: Tensor | None,
    long: int,
    short: int,
    scale: float,
    sign: int,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, D) and the log-sum-exp (B, H, T) in float32; windows `long` and `short` in any order of size.

    `sign` is 0 for the trilinear form; for determinants it is 1, or -1 if the long pair is (k2, v2).
    """
    call = _call(q, k_long, long, short)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(call.rows, call.heads, call.tokens, dtype=torch.float32, device=q.device)
    tiles = call.tiles("forward", q.dtype)
    head_blocks = _ceil(call.group, tiles.heads)
    grid = (_ceil(call.tokens, tiles.queries) * head_blocks, call.rows * call.kv_heads)
    key = _key(call, q, k_long, v_long, k_short, v_short, documents, sign=sign, tiles=tiles)
    launch(
        *(_kernels.forward_kernel, key, grid),
        *(q, k_long, v_long, k_short, v_short, documents, o, lse),
        *_strides(q, k_long, v_long, k_short, v_short),
        *(call.tokens, call.heads, call.kv_heads, call.group, head_blocks, call.long, call.short, scale),
        constants=call.constants(tiles, sign, documents, q.dtype) | {"EDGE": _edge(tiles)},
        **tiles.options,
    )
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k_long: Tensor,
    v_long: Tensor,
    k_short: Tensor,
    v_short: Tensor,
    documents: Tensor | None,
    o: Tensor,
    lse: Tensor,
    long: int,
    short: int,
    scale: float,
    sign: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k_long, v_long, k_short, v_short; arguments as in `forward`.

    `o` is contiguous. With `deterministic` the same inputs give the same bits, for eight matrix products a tile
    instead of six.
    """
    call = _call(q, k_long, long, short)
    if do.stride(3) != 1:
        do = do.contiguous()
    delta = torch.empty_like(lse)
    count = call.rows * call.tokens * call.heads
    tiles = call.tiles("rows", q.dtype, plain=documents is None and sign == 0)
    key = _key(call, q, k_long, v_long, k_short, v_short, documents, do, sign=sign, tiles=tiles)
    launch(
        *(_kernels.delta_kernel, key, (_ceil(count, 32),)),
        *(do, o, delta, count, call.heads, call.tokens, *do.stride()[:3]),
        constants={"D": call.width, "BD": call.padded, "BR": 32},
    )
    dq = torch.empty((2 if sign else 1, *q.shape), dtype=torch.float32 if sign else q.dtype, device=q.device)
    inputs = (q, k_long, v_long, k_short, v_short, documents, do, lse, delta)
    strides = _strides(q, k_long, v_long, k_short, v_short, do)
    head_blocks = _ceil(call.group, tiles.heads)
    constants = call.constants(tiles, sign, documents, q.dtype) | {
        "EDGE": _edge(tiles),
        "PLACES": max(16, power_of_two(tiles.queries + tiles.short - 1)),
    }
    sizes = (call.tokens, call.heads, call.kv_heads, call.group)
    query_tiles, pairs = _ceil(call.tokens, tiles.queries), call.rows * call.kv_heads
    if deterministic:
        d_long = _gradients_of_long(call, inputs, strides, scale, sign)
        d_short = [torch.empty_like(k_long, memory_format=torch.contiguous_format) for _ in range(2)]
        span = call.short + tiles.queries - 1
        step = max(1, min(pairs, WORKSPACE // (8 * query_tiles * span * call.width)))
        for first in range(0, pairs, step):
            now = min(step, pairs - first)
            workspace = torch.zeros(2, now, query_tiles, span, call.width, dtype=torch.float32, device=q.device)
            _kernels.rows_kernel[(query_tiles, now)](
                *(*inputs, dq, dq, dq, *workspace, None, None, *strides, first, *sizes),
                *(1, call.long, call.short, scale, dq[0].numel()),
                HEAD_BLOCKS=head_blocks,
                ADD=triton_backward.LEAVE,
                **constants,
                **tiles.options,
            )
            for source, target in zip(workspace, d_short, strict=True):
                _kernels.gather_kernel[(_ceil(call.tokens, 16), now)](
                    *(source, target, first, call.tokens, call.kv_heads, call.short),
                    D=call.width,
                    BD=call.padded,
                    BI=tiles.queries,
                    BT=16,
                )
    else:
        sums = torch.zeros(4, *k_long.shape, dtype=torch.float32, device=q.device)
        described = _described(call, tiles, sums, q.dtype)
        add = triton_backward.ATOMIC if described[0] is None else triton_backward.COPIED
        launch(
            *(_kernels.rows_kernel, key, (query_tiles * head_blocks, pairs)),
            *(*inputs, dq, *sums, *described, *strides, 0, *sizes),
            *(head_blocks, call.long, call.short, scale, dq[0].numel()),
            constants=constants | {"HEAD_BLOCKS": 1, "ADD": add},
            **tiles.options,
        )
        narrow = narrowed_parts(sums, q.dtype)
        d_long, d_short = narrow[:2], narrow[2:]
    return dq.sum(0).to(q.dtype) if sign else dq[0], d_long[0], d_long[1], d_short[0], d_short[1]


def _described(
    call: _Call, tiles: Tiles, sums: Tensor, dtype: torch.dtype
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Return how the copy engine finds tiles of the first two of sums (4, B, T, Hkv, D), or twice None without one."""
    # A tile of the widest heads, or of four bytes a number, has no room beside the others in shared memory.
    if not adds_tiles(sums.device.index) or call.width != call.padded or call.width > 128 or dtype == torch.float32:
        return None, None
    shape = [call.rows, call.tokens, call.kv_heads * call.width]
    strides = [shape[1] * shape[2], shape[2], 1]
    dk, dv = (TensorDescriptor(x, shape, strides, [1, tiles.long, call.width]) for x in (sums[0], sums[1]))
    return dk, dv


def narrowed_parts(sums: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the four parts of sums (4, ...) in `dtype`, in storages of their own, as an operator's outputs must be."""
    if dtype == torch.float32:
        return [x.clone() for x in sums]
    parts = [torch.empty(sums.shape[1:], dtype=dtype, device=sums.device) for _ in range(4)]
    count = parts[0].numel()
    key = (count, dtype, sums.device.index)
    launch(_kernels.narrow_kernel, key, (_ceil(count, 1024), 4), sums, *parts, count, constants={"BLOCK": 1024})
    return parts


def _gradients_of_long(
    call: _Call, inputs: tuple[Tensor | None, ...], strides: list[int], scale: float, sign: int
) -> list[Tensor]:
    q, k_long = inputs[0], inputs[1]
    assert q is not None
    assert k_long is not None
    tiles = call.tiles("long", q.dtype)
    key_tiles, pairs = _ceil(call.tokens, tiles.long), call.rows * call.kv_heads
    parts = max(1, min(16, _ceil(PROGRAMS, key_tiles * pairs)))
    shares = torch.empty(2, parts, *k_long.shape, dtype=torch.float32, device=q.device)
    _kernels.long_kernel[(key_tiles, pairs, parts)](
        *(*inputs, shares[0], shares[1], *strides, call.tokens, call.heads, call.kv_heads, call.group),
        *(_ceil(call.group, tiles.heads), call.long, call.short, scale, shares[0, 0].numel()),
        **call.constants(tiles, sign, inputs[5], q.dtype),
        **tiles.options,
    )
    return [share.sum(0).to(q.dtype) for share in shares]


_backward = operators.Operator("simplicial_triton_backward", backward, operators.gradients_fake)


def gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of `forward`'s arguments, of which `remember` kept what is needed."""
    return (None,) * 10 if do is None else gradients_of(do, ctx.saved_tensors, ctx.rest)


def gradients_of(do: Tensor, saved: Sequence[Tensor | None], rest: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Return the gradients of `forward`'s arguments of what `remember` kept, which a checkpoint gives only once."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return (*_backward(do, *saved, *rest, deterministic), None, None, None, None, None)


_forward = operators.Operator(
    "simplicial_triton_forward", forward, operators.attention_fake, gradients, operators.remember
)


def triton_simplicial(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    window1: int,
    window2: int,
    scale: float,
    form: str,
    bias: tuple[Tensor, Tensor] | None,
    documents: Tensor | None,
) -> Tensor:
    """Return o (B, T, H, D); arguments as in `simplicial_attention`, already checked."""
    if q.device.type == "cpu" and not interpreted():
        raise ValueError("q: on cpu; backend triton needs tensors on a GPU")
    operators.check_rows("triton", q=q, k1=k1, k2=k2, v1=v1, v2=v2)
    k2, v2 = operators.biased(k2, v2, bias)
    if documents is not None:
        documents = documents.contiguous()
    sign = 1 if form == "determinant" else 0
    pairs = (k1, v1, k2, v2, documents, window1, window2)
    if window1 < window2:
        pairs, sign = (k2, v2, k1, v1, documents, window2, window1), -sign
    return _forward(q, *pairs, scale, sign)[0]
