import itertools
from typing import Any

import pytest
import torch

from tests.contracts.mixer_checks import build, empty_state, random_input
from trivium.config import from_dict
from trivium.mixers.base import MixerConfig, MixerContext
from trivium.mixers.simplicial import SimplicialConfig
from trivium.ops import simplicial_attention
from trivium.registry import UserError

CONTEXT = MixerContext(width=12, heads=3, max_length=16)
FORMS = ("trilinear", "determinant", "factorized")
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@pytest.mark.parametrize("pair_bias", [False, True])
def test_the_mixer_is_projections_around_the_operator(form: Any, pair_bias: bool):
    pair_bias = pair_bias and form != "factorized"
    mixer = build(
        SimplicialConfig(window1=5, window2=3, kv_heads=1, form=form, bias=True, pair_bias=pair_bias), CONTEXT
    )
    x_BTD = random_input(mixer)
    q, *shared = (mixer.qkv(x_BTD).unflatten(-1, (-1, 4))).split((3, *[1] * (3 if form == "factorized" else 4)), dim=2)
    k1, k2, v1, v2 = [*shared, None][:4]
    bias = tuple(mixer.pair_bias_2GK) if pair_bias else None
    o = simplicial_attention(q, k1, k2, v1, v2, window1=5, window2=3, form=form, bias=bias, backend="reference")
    torch.testing.assert_close(mixer(x_BTD)[0], mixer.out(o.flatten(2)), rtol=0, atol=1e-10)


def test_a_pair_bias_starts_as_in_the_paper():
    pair_2GK = SimplicialConfig(pair_bias=True, kv_heads=1).build(CONTEXT).pair_bias_2GK
    assert torch.equal(pair_2GK, torch.tensor([0.25, 1.0])[:, None, None].expand(2, 1, 4))


@pytest.mark.parametrize("form", ["determinant", "factorized", "trilinear"])
def test_rotary_is_relative_where_the_help_says_so(form: Any):
    mixer = build(SimplicialConfig(window1=5, window2=3, form=form, rotary=True), CONTEXT)
    x_BTD = random_input(mixer)
    places_1T = torch.arange(x_BTD.shape[1])[None]
    near, far = mixer(x_BTD)[0], mixer(x_BTD, positions_BT=places_1T + 19)[0]
    assert torch.allclose(near, far, rtol=0, atol=1e-10) == (form != "trilinear")
    assert not torch.allclose(near, mixer(x_BTD, positions_BT=places_1T * 2)[0])


@every_form
def test_without_rotary_the_positions_change_nothing(form: Any):
    mixer = build(SimplicialConfig(window1=5, window2=3, form=form), CONTEXT)
    x_BTD = random_input(mixer)
    moved, _ = mixer(x_BTD, positions_BT=torch.arange(x_BTD.shape[1])[None] * 2)
    assert torch.equal(moved, mixer(x_BTD)[0])


@torch.no_grad()
@every_form
@pytest.mark.parametrize("windows", [(5, 2), (2, 7), (99, 99)])
def test_what_lies_in_the_state_where_nothing_was_written_is_never_read(form: Any, windows: tuple[int, int]):
    mixer = build(SimplicialConfig(window1=windows[0], window2=windows[1], form=form), CONTEXT)
    x_BTD = random_input(mixer)
    state = empty_state(mixer)
    for ring in state.rings_BCGK:
        ring.fill_(1e30)
    outputs = []
    for piece_BTD in x_BTD.split([1, 2, 1, 5, 3], dim=1):
        y_BTD, state = mixer(piece_BTD, state)
        outputs.append(y_BTD)
    torch.testing.assert_close(torch.cat(outputs, dim=1), mixer(x_BTD)[0], rtol=0, atol=1e-10)


@every_form
def test_a_state_smaller_than_the_sequence_says_so(form: Any):
    for windows in ((99, 4), (4, 99)):
        mixer = build(SimplicialConfig(window1=windows[0], window2=windows[1], form=form), CONTEXT)
        with pytest.raises(ValueError, match="sequence of 12 tokens does not fit the state's room of 8"):
            mixer(random_input(mixer), empty_state(mixer, room=8))


def test_the_state_holds_two_rings_of_their_own_windows():
    state = SimplicialConfig(window1=5, window2=2).build(CONTEXT).init_state(1, 16, "cpu", torch.float32)
    assert [ring.shape[1] for ring in state.rings_BCGK] == [5, 2, 5, 2]
    state = (
        SimplicialConfig(window1=5, window2=2, form="factorized").build(CONTEXT).init_state(1, 4, "cpu", torch.float32)
    )
    assert [ring.shape[1] for ring in state.rings_BCGK] == [4, 2, 2]


@every_form
@pytest.mark.parametrize("windows", [(5, 2), (1, 1), (3, 99)])
@pytest.mark.parametrize("length", [1, 9])
def test_flops_count_exactly_the_allowed_triples(form: Any, windows: tuple[int, int], length: int):
    config = SimplicialConfig(window1=windows[0], window2=windows[1], form=form, kv_heads=1)
    reach = [[[j for j in range(length) if i - w < j <= i] for i in range(length)] for w in windows]
    if form == "factorized":
        shared, pairs = 3, 2 * sum(len(a) + len(b) + len({*a} & {*b}) for a, b in zip(*reach, strict=True))
    else:
        shared, pairs = 4, 4 * sum(len(list(itertools.product(a, b))) for a, b in zip(*reach, strict=True))
    projections = 2 * 12 * (12 + shared * 4 + 12)
    assert config.flops_per_token(CONTEXT, length) == pytest.approx(projections + 3 * 4 * pairs / length)


def test_configs_are_equal_where_their_windows_reach_the_same():
    config = SimplicialConfig(window1=6, window2=3)
    assert config.equals_at(SimplicialConfig(window1=9, window2=3), 6)
    assert not config.equals_at(SimplicialConfig(window1=9, window2=3), 7)
    assert config.equals_at(SimplicialConfig(window1=3, window2=6), 20)
    assert not config.equals_at(SimplicialConfig(window1=6, window2=3, form="determinant"), 6)
    biased = SimplicialConfig(window1=6, window2=3, pair_bias=True)
    assert biased.equals_at(biased, 20)
    assert not biased.equals_at(SimplicialConfig(window1=3, window2=6, pair_bias=True), 20)


@every_form
def test_swapped_windows_are_the_same_family_as_equals_at_says(form: Any):
    first = build(SimplicialConfig(window1=5, window2=2, form=form), CONTEXT)
    second = build(SimplicialConfig(window1=2, window2=5, form=form), CONTEXT)
    q, k1, k2, v1, *v2 = first.qkv.weight.detach().split(12)
    values = [*v2, v1]  # v2 and v1, or the one value of the factorized form
    # The determinant changes its sign, the channel that no triple takes does not.
    signs = torch.tensor([-1, -1, -1, 1] if form == "determinant" else [1, 1, 1, 1]).repeat(3)[:, None]
    second.load_state_dict(first.state_dict() | {"qkv.weight": torch.cat([signs * q, k2, k1, *values])})
    x_BTD = random_input(first)
    torch.testing.assert_close(second(x_BTD)[0], first(x_BTD)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"window1": 0}, "layer.window1: 0 is not allowed; give at least 1"),
        ({"window2": -1}, "layer.window2: -1 is not allowed"),
        ({"form": "triliner"}, "layer.form: 'triliner' is not allowed; did you mean 'trilinear'"),
        ({"form": "factorized", "pair_bias": True}, "layer.pair_bias: the factorized form has no second value"),
    ],
)
def test_an_impossible_field_is_refused_where_it_is_given(data: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        from_dict(MixerConfig, {"kind": "simplicial"} | data, "layer")


def test_a_context_that_cannot_serve_is_refused():
    with pytest.raises(UserError, match="form: determinant needs a head width of at least 3, 6/3 is less"):
        SimplicialConfig(form="determinant").build(MixerContext(width=6, heads=3, max_length=4))
    with pytest.raises(UserError, match="rotary: needs an even head width, 9/3 is odd"):
        SimplicialConfig(rotary=True).build(MixerContext(width=9, heads=3, max_length=4))
    context = MixerContext(width=12, heads=3, max_length=4, backends={"simplicial": "fla"})
    mixer = SimplicialConfig().build(context)
    with pytest.raises(UserError, match="no backend 'fla'"):
        mixer(torch.zeros(1, 2, 12))
