import math
from typing import Any

import pytest
import torch
from torch.nn.functional import silu, softplus

from tests.contracts.mixer_checks import build, empty_state, random_input
from tests.mixers.test_gla import convolved
from trivium.config import from_dict
from trivium.mixers.base import MixerConfig, MixerContext
from trivium.mixers.gated_deltanet import GatedDeltaNetConfig
from trivium.registry import UserError
from trivium.tasks.groups import group

BARE = {"decay": False, "output_gate": False, "convolution": None}
CONTEXT = MixerContext(width=12, heads=3, max_length=16)


def by_hand(mixer: Any, config: GatedDeltaNetConfig, x_BTD: torch.Tensor) -> torch.Tensor:
    n, unit = config.householder, torch.eye(4, dtype=x_BTD.dtype)
    heads = mixer.qkv(x_BTD)
    heads = silu(heads) if mixer.convolution is None else convolved(mixer.convolution.weight_RC, heads)
    q, k, v = heads.unflatten(-1, (1 + 2 * n, 3, 4)).split((1, n, n), dim=2)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    beta = (2 if config.negative_eigenvalues else 1) * mixer.strength(x_BTD).sigmoid().unflatten(-1, (n, 3))
    decay = torch.ones_like(beta[:, :, 0])
    if config.decay:
        decay = (-mixer.decay_rate_H.exp() * softplus(mixer.decay(x_BTD) + mixer.decay_bias_H)).exp()
    y = torch.zeros_like(q[:, :, 0])
    for b in range(x_BTD.shape[0]):
        for h in range(3):
            memory = torch.zeros(4, 4, dtype=x_BTD.dtype)
            for t in range(x_BTD.shape[1]):
                memory = decay[b, t, h] * memory  # once a token, whatever the number of steps
                for i in range(n):
                    key, strength = k[b, t, i, h], beta[b, t, i, h]
                    memory = (unit - strength * torch.outer(key, key)) @ memory
                    memory = memory + strength * torch.outer(key, v[b, t, i, h])
                y[b, t, h] = q[b, t, 0, h] @ memory / math.sqrt(4)
    y = mixer.norm(y).flatten(2)
    return mixer.out(y if mixer.gate is None else y * silu(mixer.gate(x_BTD)))


@torch.no_grad()
@pytest.mark.parametrize("config", GatedDeltaNetConfig.examples())
def test_gated_deltanet_is_what_its_formula_says(config: GatedDeltaNetConfig):
    mixer = build(config, CONTEXT)
    x_BTD = random_input(mixer)
    torch.testing.assert_close(mixer(x_BTD)[0], by_hand(mixer, config, x_BTD), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("negative", "wanted"), [(True, [1, 0, 1, 1, 0, 1]), (False, None)])
def test_negative_eigenvalues_let_one_layer_hold_the_parity_of_a_word(negative: bool, wanted: list[int] | None):
    """Bit 1 has strength 2 along a fixed key and turns the memory over; strengths below 1 never change its sign."""
    config = GatedDeltaNetConfig(negative_eigenvalues=negative, decay=False, output_gate=False, convolution=None)
    mixer: Any = build(config, MixerContext(width=2, heads=1, max_length=8))
    # A token is (1, 1) for bit 1 and (1, -1) for bit 0; both share key and query, and their values are nothing.
    mixer.qkv.weight.copy_(torch.tensor([[1.0, 0], [0, 0], [1, 0], [0, 0], [-1e9, 0], [-1e9, 0]]))
    mixer.strength.weight.copy_(torch.tensor([[0.0, 40.0]]))
    mixer.norm = torch.nn.Identity()
    mixer.out.weight.copy_(torch.eye(2))
    bits = [1, 1, 1, 0, 1, 1]
    x_BTD = torch.tensor([[[1.0, 2.0 * bit - 1] for bit in bits]], dtype=torch.float64)
    state = mixer.init_state(1, 8, "cpu", torch.float64)
    state.memory_BHKV[0, 0, 0, 0] = 1
    y_BTD, _ = mixer(x_BTD, state)
    found = [int(value < 0) for value in y_BTD[0, :, 0]]
    assert found == wanted if wanted else sum(found) == 0


def transpositions(places: list[int]) -> list[tuple[int, int]]:
    """Return pairs whose exchanges, one after the other, send i to places[i]."""
    pairs, now = [], list(range(len(places)))
    for i, wanted in enumerate(places):
        if now[i] != wanted:
            pairs.append((now[i], wanted))
            now = [{now[i]: wanted, wanted: now[i]}.get(x, x) for x in now]
    return pairs


def before_silu(wanted: float) -> float:
    """Return x with silu(x) = wanted, the one nearer to 0."""
    x = 2 * wanted
    for _ in range(60):
        sigmoid = 1 / (1 + math.exp(-x))
        x -= (x * sigmoid - wanted) / (sigmoid * (1 + x * (1 - sigmoid)))
    return x


@torch.no_grad()
def test_four_householders_hold_every_product_of_a_long_word_over_s5_from_an_empty_memory():
    """Exchanging two places is a reflection. With values c k each leaves the memory c I as it is, so that the empty
    memory, which is c I less c I, becomes c I less c times the product.
    """
    s5 = group("S5")
    places = [[int(digit) - 1 for digit in symbol.strip("()")] for symbol in s5.symbols]
    config = from_dict(MixerConfig, {"kind": "gated_deltanet", "householder": 4, "negative_eigenvalues": True} | BARE)
    mixer: Any = build(config, MixerContext(width=120, heads=20, max_length=512))  # a unit vector each; one head works
    for parameter in mixer.parameters():
        parameter.zero_()
    mixer.strength.weight.fill_(-80)
    for place in range(5):
        mixer.qkv.weight[place] = before_silu((place + 1) / 10)
    for element, wanted in enumerate(places):
        for step, pair in enumerate(transpositions(wanted)):
            mixer.strength.weight[step * 20, element] = 80
            for place, value in zip(pair, (0.2, -0.2), strict=True):
                key = 120 * (1 + step) + place
                mixer.qkv.weight[key, element] = mixer.qkv.weight[key + 4 * 120, element] = before_silu(value)
    mixer.norm = torch.nn.Identity()
    mixer.out.weight.copy_(torch.eye(120))
    word = torch.randint(120, (512,), generator=torch.Generator().manual_seed(0))
    y_TD = mixer(torch.eye(120, dtype=torch.float64)[word][None])[0][0]
    query = torch.arange(1, 6, dtype=torch.float64) / math.sqrt(55)
    product, c = 0, 0.2 * math.sqrt(2)
    for element, found in zip(word.tolist(), y_TD, strict=True):
        product = int(s5.table[product, element])
        moved = query[torch.tensor(places[product])]
        torch.testing.assert_close(found[:5], c * (query - moved) / math.sqrt(6), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("householder", "window"), [(1, 4), (3, None)])
def test_the_state_does_not_grow_with_the_context(householder: int, window: int | None):
    config = GatedDeltaNetConfig(householder=householder, convolution=window)
    recent = 0 if window is None else 3 * 36
    for length in (1, 40_000):
        assert config.state_bytes(CONTEXT, length, torch.float32) == 4 * (3 * 16 + recent)
        assert config.state_bytes(CONTEXT, length, torch.bfloat16) == 4 * 3 * 16 + 2 * recent


def test_flops_grow_with_the_delta_steps_by_their_maps_and_memory():
    one, four = (GatedDeltaNetConfig(householder=n, convolution=None).flops_per_token(CONTEXT, 7) for n in (1, 4))
    assert one == 2 * 12 * (3 * 12 + 2 * 3 + 2 * 12) + 7 * 3 * 16
    assert four - one == 3 * (2 * 12 * (2 * 12 + 3) + 4 * 3 * 16)


@torch.no_grad()
def test_decays_begin_spread_between_a_token_and_hundreds():
    torch.manual_seed(0)
    mixer: Any = GatedDeltaNetConfig().build(MixerContext(width=256, heads=64, max_length=16))
    half_life = math.log(2) / (mixer.decay_rate_H.exp() * softplus(mixer.decay_bias_H))
    assert float(half_life.min()) < 2
    assert float(half_life.max()) > 100


def test_a_state_and_documents_together_are_refused():
    mixer = build(GatedDeltaNetConfig(), CONTEXT)
    with pytest.raises(ValueError, match="documents_BT: a state continues one document a row"):
        mixer(random_input(mixer), empty_state(mixer), documents_BT=torch.zeros(3, 12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"householder": 0}, "layer.householder: 0 is not allowed; give at least 1"),
        ({"convolution": 1}, "layer.convolution: 1 is not allowed; give at least 2, or null for none"),
        ({"negative_eigenvalue": True}, "unknown key; did you mean 'negative_eigenvalues'"),
    ],
)
def test_an_impossible_field_is_refused_where_it_is_given(data: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        from_dict(MixerConfig, {"kind": "gated_deltanet"} | data, "layer")


def test_norms_that_autocast_makes_in_float32_leave_the_operators_inputs_alike(monkeypatch):
    # A CUDA device does this; on the CPU autocast leaves norms alone.
    normalize = torch.nn.functional.normalize
    monkeypatch.setattr(torch.nn.functional, "normalize", lambda x, **options: normalize(x.float(), **options))
    mixer, x_BTD = GatedDeltaNetConfig(convolution=None).build(CONTEXT), torch.randn(2, 5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BTD, _ = mixer(x_BTD)
    torch.testing.assert_close(y_BTD.float(), mixer(x_BTD)[0], rtol=0.1, atol=0.05)
