"""Tiles of fused linear maps: what their programs hold must fit the chip, whose compiler is asked without one."""

from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from trivium.ops.fused_linear import FEEDFORWARD_HIDDEN, FEEDFORWARD_WIDTHS, WIDEST, kernels, launch  # noqa: E402

SHARED = 232_448  # bytes that a program may have on compute capability 9.0
ROWS = (1, 256, 257, 4096, 4097, 180_000)
WIDTHS = (256, 512, WIDEST)  # the narrower ones hold less
OUTER = (14, 1024)


def shared_bytes(kernel: Any, tiles: launch.Tiles, floats: str, constants: dict[str, Any]) -> int:
    signature = dict.fromkeys(floats.split(), "*bf16") | {"rows": "i32", "outer": "i32"}
    if "gamma" in signature:
        signature["eps"] = "fp32"
    aligned: Any = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind != "fp32"
    }
    constants = {"BM": tiles.rows, "BN": tiles.columns, "BIASED": True, "PRECISION": "tf32", **constants}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def norm_linear_bytes(tiles: launch.Tiles, inner: int) -> int:
    constants = {"D": inner, "BD": tiles.part, "TILES": tiles.tiles, "CENTRED": True, "ACTIVATION": 2, "QUICK": True}
    return shared_bytes(kernels.norm_linear_kernel, tiles, "x gamma beta weight bias y", constants)


def test_every_tiling_of_norm_linear_fits_the_shared_memory_of_the_chip():
    tilings = {
        (launch.norm_linear_tiles(m, d, n, a), d) for m in ROWS for d in WIDTHS for n in OUTER for a in (False, True)
    }
    # More than a few tiles after one another need no more than a few.
    cases = {(tiles._replace(tiles=min(tiles.tiles, 4)), d) for tiles, d in tilings}
    found = {case: norm_linear_bytes(*case) for case in cases}
    assert 0 < max(found.values()) <= SHARED, found


def test_every_tiling_of_linear_add_fits_the_shared_memory_of_the_chip():
    cases = {(launch.linear_add_tiles(m, d, n), d) for m in ROWS for d in (*WIDTHS, 4096) for n in OUTER}
    found = {
        (tiles, d): shared_bytes(kernels.linear_add_kernel, tiles, "x weight bias stream y", {"D": d, "BK": tiles.part})
        for tiles, d in cases
    }
    assert 0 < max(found.values()) <= SHARED, found


def test_every_width_of_norm_feedforward_fits_the_shared_memory_of_the_chip():
    floats = "x gamma beta into into_bias back back_bias y"
    signature: Any = dict.fromkeys(floats.split(), "*bf16") | {"rows": "i32", "eps": "fp32"}
    aligned: Any = {(place,): [["tt.divisibility", 16]] for place in range(len(signature) - 1)}
    constants = {"F": 1024, "BM": launch.FEEDFORWARD_ROWS, "BF": launch.FEEDFORWARD_PART}
    constants |= {"CENTRED": True, "BIASED": True, "ACTIVATION": 2, "QUICK": True, "D": max(FEEDFORWARD_WIDTHS)}
    assert constants["BF"] == FEEDFORWARD_HIDDEN
    source = ASTSource(
        kernels.norm_feedforward_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 2})
    assert 0 < compiled.metadata.shared <= SHARED


def test_the_compiler_tells_the_tiling_that_a_gpu_refused():
    assert norm_linear_bytes(launch.Tiles(128, 128, 256, 6, 8, 3), 256) == 294_912 > SHARED
