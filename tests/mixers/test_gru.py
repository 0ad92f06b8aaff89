from typing import Any

import pytest
import torch

from tests.contracts.mixer_checks import build, empty_state, random_input
from trivium.mixers.base import MixerContext
from trivium.mixers.gru import GRUConfig

CONTEXT = MixerContext(width=12, heads=3, max_length=16)


def by_hand(mixer: Any, x_BTD: torch.Tensor) -> torch.Tensor:
    hidden, outputs = torch.zeros_like(x_BTD[:, 0]), []
    weights = dict(mixer.unit.named_parameters())
    nothing = torch.zeros(36, dtype=x_BTD.dtype)
    bias_x, bias_h = weights.get("bias_ih_l0", nothing), weights.get("bias_hh_l0", nothing)
    for x in x_BTD.unbind(1):
        reset_x, update_x, new_x = (x @ weights["weight_ih_l0"].T + bias_x).chunk(3, dim=-1)
        reset_h, update_h, new_h = (hidden @ weights["weight_hh_l0"].T + bias_h).chunk(3, dim=-1)
        update = (update_x + update_h).sigmoid()
        hidden = (1 - update) * (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh() + update * hidden
        outputs.append(hidden)
    return mixer.out(torch.stack(outputs, dim=1))


@torch.no_grad()
@pytest.mark.parametrize("config", GRUConfig.examples())
def test_gru_is_what_its_formula_says(config: GRUConfig):
    mixer = build(config, CONTEXT)
    x_BTD = random_input(mixer)
    torch.testing.assert_close(mixer(x_BTD)[0], by_hand(mixer, x_BTD), rtol=0, atol=1e-10)


@torch.no_grad()
def test_an_id_that_comes_back_begins_another_document():
    mixer = build(GRUConfig(), CONTEXT)
    x_BTD = random_input(mixer, rows=2)
    ids_BT = torch.tensor([[3] * 4 + [1] * 3 + [3] * 5, [3] * 12])
    packed, _ = mixer(x_BTD, documents_BT=ids_BT)
    alone = [mixer(part)[0] for part in x_BTD[:1].split((4, 3, 5), dim=1)]
    torch.testing.assert_close(packed[:1], torch.cat(alone, dim=1), rtol=0, atol=1e-10)
    torch.testing.assert_close(packed[1:], mixer(x_BTD[1:])[0], rtol=0, atol=1e-10)


def test_under_autocast_the_recurrence_keeps_the_precision_of_its_weights():
    mixer = build(GRUConfig(), CONTEXT, torch.float32)
    x_BTD = random_input(mixer)
    exact = mixer.unit(x_BTD)[0]
    seen: list[torch.Tensor] = []
    mixer.out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixer(x_BTD)
    assert torch.equal(seen[0], exact)


def test_the_state_is_the_hidden_vector_and_does_not_grow():
    for length in (1, 40_000):
        assert GRUConfig().state_bytes(CONTEXT, length, torch.float32) == 48
    assert GRUConfig().flops_per_token(CONTEXT, 7) == 14 * 144


def test_a_state_and_documents_together_are_refused():
    mixer = build(GRUConfig(), CONTEXT)
    with pytest.raises(ValueError, match="documents_BT: a state continues one document a row"):
        mixer(random_input(mixer), empty_state(mixer), documents_BT=torch.zeros(3, 12, dtype=torch.int64))
