import math
from typing import Any

import pytest
import torch

from tests.contracts.mixer_checks import build, empty_state, random_input
from trivium.config import from_dict
from trivium.mixers.attention import AttentionConfig
from trivium.mixers.base import MixerConfig, MixerContext
from trivium.mixers.rotary import rotate
from trivium.registry import UserError

CONTEXT = MixerContext(width=12, heads=3, max_length=16)


def by_hand(mixer: Any, x_BTD: torch.Tensor, window: int, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
    heads = mixer.qkv(x_BTD).unflatten(-1, (-1, mixer.head_width))
    q, k, v = heads.split((mixer.heads, mixer.kv_heads, mixer.kv_heads), dim=2)
    q, k = mixer.query_norm(q), mixer.key_norm(k)
    if positions_BT is not None:
        q, k = rotate(q, positions_BT, 1e4), rotate(k, positions_BT, 1e4)
    y = torch.zeros_like(q)
    for i in range(q.shape[1]):
        for h in range(mixer.heads):
            g, first = h // (mixer.heads // mixer.kv_heads), max(0, i - window + 1)
            logits = (k[:, first : i + 1, g] @ q[:, i, h, :, None])[..., 0] / math.sqrt(mixer.head_width)
            y[:, i, h] = (logits.softmax(-1)[:, None] @ v[:, first : i + 1, g])[:, 0]
    return mixer.out(y.flatten(2))


@pytest.mark.parametrize("kv_heads", [None, 1, 3])
@pytest.mark.parametrize("window", [None, 1, 4, 99])
@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_attention_is_what_its_formula_says(kv_heads: int | None, window: int | None, positions: str):
    context = MixerContext(width=12, heads=3, max_length=16, positions=positions)
    mixer = build(AttentionConfig(window=window, kv_heads=kv_heads, qk_norm=True, bias=True), context)
    x_BTD = random_input(mixer)
    places = torch.arange(x_BTD.shape[1])[None] if positions == "rotary" else None
    torch.testing.assert_close(mixer(x_BTD)[0], by_hand(mixer, x_BTD, window or 99, places), rtol=0, atol=1e-10)
    if places is not None:
        moved = mixer(x_BTD, positions_BT=places * 2)[0]
        torch.testing.assert_close(moved, by_hand(mixer, x_BTD, window or 99, places * 2), rtol=0, atol=1e-10)


def test_a_state_smaller_than_the_sequence_says_so_and_a_window_streams_forever():
    full, local = (build(AttentionConfig(window=window), CONTEXT) for window in (None, 4))
    x_BTD = random_input(full)
    with pytest.raises(ValueError, match="sequence of 12 tokens does not fit the state's room of 8"):
        full(x_BTD, empty_state(full, room=8))
    state, outputs = empty_state(local, room=8), []
    for piece_BTD in x_BTD.split(3, dim=1):
        y_BTD, state = local(piece_BTD, state)
        outputs.append(y_BTD)
    torch.testing.assert_close(torch.cat(outputs, dim=1), local(x_BTD)[0], rtol=0, atol=1e-10)


def test_a_state_and_documents_together_are_refused():
    mixer = build(AttentionConfig(), CONTEXT)
    with pytest.raises(ValueError, match="documents_BT: a state continues one document a row"):
        mixer(random_input(mixer), empty_state(mixer), documents_BT=torch.zeros(3, 12, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("config", [AttentionConfig(), AttentionConfig(window=4)])
def test_what_lies_in_the_state_where_nothing_was_written_is_never_read(config: AttentionConfig):
    mixer = build(config, CONTEXT)
    x_BTD = random_input(mixer)
    state = empty_state(mixer)
    for ring in (state.keys_BCGK, state.values_BCGK):
        ring.fill_(1e30)
    y_BTD, state = mixer(x_BTD[:, :1], state)
    rest_BTD, _ = mixer(x_BTD[:, 1:], state)
    torch.testing.assert_close(torch.cat((y_BTD, rest_BTD), dim=1), mixer(x_BTD)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 1, 4, 99])
@pytest.mark.parametrize("length", [1, 9])
def test_flops_count_exactly_the_allowed_pairs(window: int | None, length: int):
    config = AttentionConfig(window=window, kv_heads=1)
    pairs = sum(i - (window or length) < j <= i for i in range(length) for j in range(length))
    projections = 2 * 12 * (12 + 2 * 4 + 12)
    assert config.flops_per_token(CONTEXT, length) == pytest.approx(projections + 4 * 4 * 3 * pairs / length)


def test_a_window_that_covers_the_sequence_equals_no_window():
    full, local = AttentionConfig(), AttentionConfig(window=6)
    assert local.equals_at(full, 6)
    assert full.equals_at(local, 3)
    assert not local.equals_at(full, 7)
    assert not full.equals_at(local, 7)
    assert not AttentionConfig(window=6, qk_norm=True).equals_at(full, 6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"window": 0}, "layer.window: 0 is not allowed; give at least 1, or null"),
        ({"kv_heads": 0}, "layer.kv_heads: 0 is not allowed"),
        ({"widow": 3}, "layer.widow: unknown key; did you mean 'window'"),
    ],
)
def test_an_impossible_field_is_refused_where_it_is_given(data: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        from_dict(MixerConfig, {"kind": "attention"} | data, "layer")


def test_heads_that_divide_nothing_are_refused():
    with pytest.raises(UserError, match="heads: 5 do not divide the width 12"):
        AttentionConfig().build(MixerContext(width=12, heads=5, max_length=4))
    with pytest.raises(UserError, match="kv_heads: 2 do not divide the 3 heads"):
        AttentionConfig(kv_heads=2).num_params(CONTEXT)
    with pytest.raises(UserError, match="rotary needs an even head width, 9/3 is odd"):
        AttentionConfig().build(MixerContext(width=9, heads=3, max_length=4, positions="rotary"))
