from typing import Any

import pytest
import torch

from trivium.ops import dispatch
from trivium.ops.memory_step import convolution_step_, memory_step_
from trivium.registry import UserError

BACKENDS = [name for name, why in dispatch.backends("memory_step").items() if why is None and name != "reference"]


def draw(widths: tuple[int, int], corrections: int, decay: str, written: str, dtype: torch.dtype) -> list[Any]:
    rows, heads = 3, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = normal(rows, heads, widths[0])
    k = torch.nn.functional.normalize(normal(rows, corrections, heads, widths[0]), dim=-1)  # as the delta rule wants
    v = normal(rows, corrections, heads, widths[1])
    beta = 2 * normal(rows, corrections, heads).sigmoid() if written == "corrected" else None
    factors = {"none": None, "head": normal(rows, heads).sigmoid(), "channel": normal(rows, heads, widths[0]).sigmoid()}
    return [q, k, v, beta, factors[decay], normal(rows, heads, *widths)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(1, 1), (3, 5), (16, 16), (7, 33), (64, 64), (8, 130)])
@pytest.mark.parametrize(
    ("corrections", "decay", "written"),
    [(1, "head", "corrected"), (4, "none", "corrected"), (3, "head", "corrected"), (1, "channel", "added")],
)
def test_every_backend_equals_the_formula_in_output_and_state(
    widths: tuple[int, int], corrections: int, decay: str, written: str, dtype: torch.dtype, backend: str
):
    drawn = draw(widths, corrections, decay, written, torch.float64)
    wanted = memory_step_(*drawn, backend="reference")
    mine = [None if each is None else each.to(dtype) for each in draw(widths, corrections, decay, written, dtype)]
    found = memory_step_(*mine, backend=backend)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for one, other in ((found, wanted), (mine[-1], drawn[-1])):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif("native" not in BACKENDS, reason="no C compiler")
def test_the_kernel_in_c_refuses_what_it_would_read_wrongly():
    drawn = draw((4, 6), 2, "head", "corrected", torch.float32)
    with pytest.raises(
        ValueError, match=r"v: torch.float32 of \(3, 2, 2, 5\); expected torch.float32 of \(3, 2, 2, 6\)"
    ):
        memory_step_(drawn[0], drawn[1], drawn[2][..., :5], *drawn[3:], backend="native")
    across = drawn[-1].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(UserError, match="the state is not contiguous"):
        memory_step_(*drawn[:-1], across, backend="native")
    kept = drawn[-1].clone()
    torch.testing.assert_close(memory_step_(*drawn[:-1], across), memory_step_(*drawn[:-1], kept, backend="torch"))
    torch.testing.assert_close(across, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("past", "channels"), [(1, 1), (3, 7), (3, 64), (5, 130)])
def test_every_backend_convolves_and_moves_the_inputs(past: int, channels: int, dtype: torch.dtype, backend: str):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, channels), (3, past, channels), (past + 1, channels))
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[0][0], drawn[2][-1] = -400.0, 1.0  # SiLU of what is very negative is 0, and no nan
    mine = [each.to(dtype, copy=True) for each in drawn]
    wanted, found = convolution_step_(*drawn, backend="reference"), convolution_step_(*mine, backend=backend)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine[1], drawn[1].to(dtype), rtol=0, atol=0)


@pytest.mark.skipif("native" not in BACKENDS, reason="no C compiler")
def test_the_convolution_in_c_refuses_what_it_would_read_wrongly():
    x, recent, weight = torch.zeros(2, 4), torch.zeros(2, 3, 4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"weight: torch.float32 of \(3, 4\); expected torch.float32 of \(4, 4\)"):
        convolution_step_(x, recent, weight, backend="native")
