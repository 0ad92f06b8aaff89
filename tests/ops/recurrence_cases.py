"""Arguments and results of gated linear attention and the gated delta rule, for the tests of their backends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.model_checks import assert_equal
from trivium.ops import gated_delta_rule, gated_linear_attention

OPERATORS = {"gated_linear_attention": gated_linear_attention, "gated_delta_rule": gated_delta_rule}
every_operator = pytest.mark.parametrize("name", list(OPERATORS))


def draw(
    name: str,
    tokens: int,
    *,
    rows: int = 2,
    heads: int = 2,
    width: int = 3,
    value_width: int = 5,
    decay: str = "mild",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Return arguments of the operator, a state included; decays are mild, strong, or the strongest."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys = torch.nn.functional.normalize(normal(rows, tokens, heads, width), dim=-1)
    arguments = {"q": normal(rows, tokens, heads, width), "k": keys, "v": normal(rows, tokens, heads, value_width)}
    gates = (rows, tokens, heads)
    if name == "gated_delta_rule":
        arguments["beta"] = 2 * normal(*gates).sigmoid()
    else:
        gates = (*gates, width)
    log_decay = -normal(*gates).abs() * {"mild": 0.1, "strong": 30.0, "strongest": 1e4}[decay]
    if decay == "strongest":  # some channels keep all, some nothing
        log_decay = log_decay.masked_fill(normal(*gates) > 1, 0.0).masked_fill(normal(*gates) > 1, -torch.inf)
    arguments |= {"log_decay": log_decay, "state": normal(rows, heads, width, value_width)}
    return {key: tensor.to(dtype).requires_grad_() for key, tensor in arguments.items()}


def results(name: str, arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    """Return the output, the final state and all gradients."""
    o, state = OPERATORS[name](**arguments, **options)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, state)]
    loss = (o * weights[0]).sum() + (state * weights[1]).sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(loss, list(arguments.values()))]


def assert_all_equal(mine: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, wanted in zip(mine, expected, strict=True):
        assert tensor.dtype == wanted.dtype
        assert_equal(tensor, wanted)


def packed(tokens: int) -> Tensor:
    """Return ids of documents (2, tokens) whose borders lie elsewhere in each row, one of them on a chunk's border."""
    place_T = torch.arange(tokens)
    first = (place_T >= 3).long() + (place_T >= 4).long() + (place_T >= 32).long() * 5
    return torch.stack((first, 7 - (place_T >= tokens // 2).long()))
