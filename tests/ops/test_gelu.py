import pytest
import torch

from trivium.ops import dispatch
from trivium.ops.gelu import gelu

FAST = [name for name, missing in dispatch.backends("gelu").items() if missing is None and name != "reference"]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", [(1,), (3, 37), (2, 5, 64)], ids=str)
def test_a_backend_gives_the_value_and_slope_of_the_reference(backend: str, shape: tuple[int, ...]):
    wide = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(x: torch.Tensor, name: str) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = gelu(leaf, backend=name)
        return [y.detach(), *torch.autograd.grad((y * weights.to(y.dtype)).sum(), leaf)]

    expected = run(wide, "reference")
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for mine, wanted in zip(run(wide.to(dtype), backend), expected, strict=True):
            assert float((mine.double() - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("backend", FAST)
def test_far_out_it_is_nought_or_the_identity(backend: str):
    far = torch.tensor([-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e12, torch.inf, torch.nan])
    y = gelu(far, backend=backend)
    torch.testing.assert_close(y[1:7], torch.tensor([0.0, 0.0, 0.0, 20.0, 100.0, 1e12]), rtol=0, atol=1e-12)
    assert y[0].abs() < 1e-3
    assert y[7] == torch.inf
    assert y[8].isnan()


def test_rows_that_do_not_follow_one_another_are_read_in_their_places():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for backend in FAST:
        torch.testing.assert_close(gelu(x.T, backend=backend), gelu(x, backend=backend).T, rtol=0, atol=0)
