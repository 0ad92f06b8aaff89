import math
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from tests.contracts.mixer_checks import build, empty_state, random_input
from trivium.config import from_dict
from trivium.mixers.base import MixerConfig, MixerContext
from trivium.mixers.gla import GLAConfig
from trivium.mixers.memory import ShortConvolution
from trivium.registry import UserError

CONTEXT = MixerContext(width=12, heads=3, max_length=16)


def by_hand(mixer: Any, x_BTD: torch.Tensor) -> torch.Tensor:
    heads = mixer.qkv(x_BTD)
    if mixer.convolution is not None:
        heads = convolved(mixer.convolution.weight_RC, heads)
    q, k, v = heads.unflatten(-1, (3, 3, 4)).unbind(2)
    decay = (mixer.decay(x_BTD).sigmoid() ** (1 / 16)).unflatten(-1, (3, 4))
    y = torch.zeros_like(q)
    for b in range(x_BTD.shape[0]):
        for h in range(3):
            memory = torch.zeros(4, 4, dtype=x_BTD.dtype)
            for t in range(x_BTD.shape[1]):
                memory = torch.diag(decay[b, t, h]) @ memory + torch.outer(k[b, t, h], v[b, t, h])
                y[b, t, h] = q[b, t, h] @ memory / math.sqrt(4)
    y = mixer.norm(y).flatten(2)
    return mixer.out(y if mixer.gate is None else y * silu(mixer.gate(x_BTD)))


def convolved(weight_RC: torch.Tensor, x_BTC: torch.Tensor) -> torch.Tensor:
    """Return what torch's own convolution gives, with zeros before the beginning."""
    padded = torch.nn.functional.pad(x_BTC.mT, (len(weight_RC) - 1, 0))
    return silu(torch.nn.functional.conv1d(padded, weight_RC.T[:, None], groups=x_BTC.shape[2]).mT)


@torch.no_grad()
@pytest.mark.parametrize("config", GLAConfig.examples())
def test_gla_is_what_its_formula_says(config: GLAConfig):
    mixer = build(config, CONTEXT)
    x_BTD = random_input(mixer)
    torch.testing.assert_close(mixer(x_BTD)[0], by_hand(mixer, x_BTD), rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_short_convolution_reads_nothing_of_another_document():
    convolution = ShortConvolution(5, 4).double()
    x_BTC = torch.randn(1, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The first document comes back under its old id: that is a third document.
    y_BTC, recent_BRC = convolution(x_BTC, documents_BT=torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0]]))
    alone = [convolved(convolution.weight_RC, part) for part in x_BTC.split((2, 3, 4), dim=1)]
    torch.testing.assert_close(y_BTC, torch.cat(alone, dim=1), rtol=0, atol=1e-12)
    assert torch.equal(recent_BRC, x_BTC[:, -3:])


@torch.no_grad()
def test_decays_begin_mild_so_that_a_new_model_remembers():
    torch.manual_seed(0)
    mixer: Any = GLAConfig().build(MixerContext(width=64, heads=4, max_length=16))
    decay = mixer.decay(torch.randn(100, 64)).sigmoid() ** (1 / 16)
    assert 0.9 < float(decay.min()) <= float(decay.max()) < 1


@pytest.mark.parametrize("window", [None, 4])
def test_the_state_does_not_grow_with_the_context(window: int | None):
    config = GLAConfig(convolution=window)
    recent = 0 if window is None else 3 * 36
    for length in (1, 40_000):
        assert config.state_bytes(CONTEXT, length, torch.float32) == 4 * (3 * 16 + recent)
        # The memory is a running sum, which bfloat16 would soon stop adding to.
        assert config.state_bytes(CONTEXT, length, torch.bfloat16) == 4 * 3 * 16 + 2 * recent


def test_flops_are_those_of_the_maps_the_convolution_and_the_memory():
    memory = 3 * 5 * 16
    maps = 2 * (5 * 144 + 2 * 16 * 12)
    assert GLAConfig().flops_per_token(CONTEXT, 7) == maps + memory
    smaller = GLAConfig(gate_rank=2, output_gate=False, convolution=3)
    assert smaller.flops_per_token(CONTEXT, 7) == 2 * (4 * 144 + 2 * 2 * 12) + 2 * 3 * 36 + memory


def test_a_state_and_documents_together_are_refused():
    mixer = build(GLAConfig(), CONTEXT)
    with pytest.raises(ValueError, match="documents_BT: a state continues one document a row"):
        mixer(random_input(mixer), empty_state(mixer), documents_BT=torch.zeros(3, 12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"gate_rank": 0}, "layer.gate_rank: 0 is not allowed; give at least 1"),
        ({"convolution": 0}, "layer.convolution: 0 is not allowed"),
        ({"convolution": 1}, "layer.convolution: 1 is not allowed; give at least 2, or null for none"),
        ({"output_gates": True}, "layer.output_gates: unknown key; did you mean 'output_gate'"),
    ],
)
def test_an_impossible_field_is_refused_where_it_is_given(data: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        from_dict(MixerConfig, {"kind": "gla"} | data, "layer")


def test_heads_that_do_not_divide_the_width_are_refused():
    for call in (GLAConfig().build, GLAConfig().num_params):
        with pytest.raises(UserError, match="heads: 5 do not divide the width 12"):
            call(MixerContext(width=12, heads=5, max_length=4))
