import math

import pytest
import torch
from torch.nn import functional

from trivium.model.feedforward import FeedForward, default_width, flops_per_token, num_params

X = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(3, 4)


def build(kind) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(kind, 4, 6, std=0.5, output_std=0.5).double()


def test_gelu_new_is_the_tanh_form_of_gpt2():
    block = build("gelu_new")
    hidden = block.input(X)
    expected = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(X), block.output(expected))


def test_gelu_is_the_exact_form():
    block = build("gelu")
    hidden = block.input(X)
    torch.testing.assert_close(block(X), block.output(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))))


def test_swiglu_gates_one_half_with_the_other():
    block = build("swiglu")
    gate, up = (functional.linear(X, weight) for weight in block.input.weight.split(6))
    torch.testing.assert_close(block(X), block.output(gate * torch.sigmoid(gate) * up))


@pytest.mark.parametrize("kind", ["gelu", "gelu_new", "swiglu"])
def test_counts_are_those_of_the_module(kind):
    block = build(kind)
    assert num_params(kind, 4, 6) == sum(parameter.numel() for parameter in block.parameters())
    assert flops_per_token(kind, 4, 6) == 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2)


def test_default_widths_of_both_forms_weigh_the_same():
    assert default_width("gelu", 96) == 384
    assert default_width("swiglu", 96) == 256
    assert flops_per_token("gelu", 96, 384) == flops_per_token("swiglu", 96, 256)
