"""flash-linear-attention's own kernels against the float64 recurrence, on a CUDA device that has them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_recurrence import OPERATORS, draw, every_operator, packed
from trivium.ops.recurrence import fla_backward_refuses, fla_missing

pytestmark = pytest.mark.skipif(fla_missing() is not None, reason=f"fla: {fla_missing()}")

# By input: float32 as everywhere; bfloat16 rounds inputs and outputs to 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def on_device(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments on the device: queries, keys and values in `dtype`, gates and state in float32."""
    return {
        name: tensor.detach().to("cuda", dtype if name in ("q", "k", "v") else torch.float32).requires_grad_()
        for name, tensor in arguments.items()
    }


def results(name: str, arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    """Return the output, the final state and all gradients; what they are weighted with is drawn on the CPU."""
    o, state = OPERATORS[name](**arguments, **options)
    generator = torch.Generator().manual_seed(9)
    drawn = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, state))
    loss = torch.stack([(x * weights).sum().double() for x, weights in zip((o, state), drawn, strict=True)]).sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(loss, list(arguments.values()))]


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@every_operator
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 63, 100, 300])
def test_output_state_and_every_gradient_equal_the_recurrence(
    name: str, tokens: int, dtype: torch.dtype, documents: bool
):
    arguments = on_device(draw(name, tokens, width=64, value_width=64), dtype)
    ids = packed(tokens).cuda() if documents else None
    wide = {key: tensor.detach().double().requires_grad_() for key, tensor in arguments.items()}
    wanted = results(name, wide, backend="reference", documents=ids)
    refused = name == "gated_delta_rule" and fla_backward_refuses({"gradients": True})
    found = [] if refused else results(name, arguments, backend="fla", documents=ids)
    with torch.no_grad():  # a few tokens take the recurrent kernel
        o, state = OPERATORS[name](**arguments, backend="fla", documents=ids)
    names = ("o", "final state", *arguments)  # then gradients, by the arguments' names
    errors = {key: off(mine, theirs) for key, mine, theirs in zip(names, found, wanted, strict=not refused)}
    errors |= {"o without gradient": off(o, wanted[0]), "state without gradient": off(state, wanted[1])}
    assert max(errors.values()) <= TOLERANCE[dtype], errors
    if refused:
        pytest.skip(f"output and state agree; {refused}")
