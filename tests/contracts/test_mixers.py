"""Every registered mixer keeps the contract; beside each check its twin, a planted bug that the check must catch."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from tests.contracts import mixer_checks as checks
from trivium.mixers import cache
from trivium.mixers.attention import AttentionConfig
from trivium.mixers.base import MIXERS, MixerConfig, MixerContext, State
from trivium.mixers.simplicial import SimplicialConfig
from trivium.ops import dispatch
from trivium.ops.simplicial.windowed import windowed
from trivium.registry import UserError

EVEN = MixerContext(width=24, heads=4, max_length=16, positions="rotary")
ODD = MixerContext(width=20, heads=4, max_length=16)
BEHAVIOURS = (
    checks.check_streaming,
    checks.check_ragged,
    checks.check_causal,
    checks.check_wanted,
    checks.check_documents,
    checks.check_functional,
    checks.check_in_place,
    checks.check_select_and_reset,
    checks.check_output,
)


def serves(config: MixerConfig, context: MixerContext) -> bool:
    """Say whether `context` suits `config`: rotary turns pairs, which an odd head width has not."""
    try:
        config.build(context)
    except UserError:
        return False
    return True


EXAMPLES = [example for name in MIXERS.names() for example in MIXERS.get(name).examples()]
CASES = [(config, EVEN) for config in EXAMPLES] + [(config, ODD) for config in EXAMPLES if serves(config, ODD)]


def describe(value: Any) -> str:
    if isinstance(value, MixerConfig):
        return f"{value.kind}{EXAMPLES.index(value)}"
    if isinstance(value, MixerContext):
        return f"width{value.head_width}"
    return getattr(value, "__name__", str(value)).removeprefix("check_")


@pytest.mark.parametrize(("config", "context"), CASES, ids=describe)
@pytest.mark.parametrize("check", BEHAVIOURS, ids=describe)
def test_a_mixer_keeps_the_contract_in_float64(check: Any, config: MixerConfig, context: MixerContext):
    check(checks.build(config, context))


@pytest.mark.parametrize("config", EXAMPLES, ids=describe)
def test_a_mixer_keeps_the_contract_in_float32(config: MixerConfig):
    mixer = checks.build(config, EVEN, torch.float32)
    for check in (checks.check_streaming, checks.check_ragged, checks.check_documents, checks.check_functional):
        check(mixer)


@pytest.mark.parametrize("config", EXAMPLES, ids=describe)
def test_a_mixer_runs_in_bfloat16_under_autocast(config: MixerConfig):
    checks.check_bfloat16(checks.build(config, EVEN, torch.float32))


@pytest.mark.parametrize(("config", "context"), CASES, ids=describe)
def test_a_mixer_costs_what_its_config_says(config: MixerConfig, context: MixerContext):
    checks.check_counts(config, context)


@pytest.mark.parametrize(("config", "context"), CASES, ids=describe)
def test_every_backend_of_a_mixer_equals_the_reference(config: MixerConfig, context: MixerContext):
    checks.check_backends(config, context)


@pytest.mark.parametrize("name", MIXERS.names())
def test_a_mixer_equals_itself_and_nothing_of_another_kind(name: str):
    first = MIXERS.get(name).examples()[0]
    assert first.equals_at(first, 8)
    assert not any(first.equals_at(other, 8) for other in EXAMPLES if other.kind != name)


# ---- The twins: each check meets the mistake that it is there for.

SOUND = [AttentionConfig(window=5, kv_heads=2), SimplicialConfig(window1=5, window2=3, kv_heads=2)]
sound_mixers = pytest.mark.parametrize("config", SOUND, ids=lambda config: config.kind)


class Buggy(nn.Module):
    """A sound mixer with one mistake."""

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.mixer = checks.build(config, EVEN)

    def init_state(self, *arguments: Any) -> Any:
        return self.mixer.init_state(*arguments)

    def forward(self, x_BTD: torch.Tensor, state: Any = None, **options: Any) -> Any:
        return self.mixer(x_BTD, state, **options)


class OtherWindowAtPlaces(Buggy):
    def at(self, x_BTD: torch.Tensor, wanted_N: torch.Tensor, **options: Any) -> Any:
        self.mixer.window += 1
        y_ND = self.mixer.at(x_BTD, wanted_N, **options)
        self.mixer.window -= 1
        return y_ND


class OtherWindowWhenStreaming(Buggy):
    def __init__(self, config: Any, **change: int):
        super().__init__(config)
        self.streaming = checks.build(dataclasses.replace(config, **change), EVEN)

    def init_state(self, *arguments: Any) -> Any:
        return self.streaming.init_state(*arguments)

    def forward(self, x_BTD: torch.Tensor, state: Any = None, **options: Any) -> Any:
        return (self.mixer if state is None else self.streaming)(x_BTD, state, **options)


class TakesPaddingForTokens(Buggy):
    def forward(self, x_BTD: torch.Tensor, state: Any = None, lengths_B: Any = None, **options: Any) -> Any:
        return self.mixer(torch.nan_to_num(x_BTD), state, **options)


class PeeksAhead(Buggy):
    def forward(self, x_BTD: torch.Tensor, state: Any = None, **options: Any) -> Any:
        y_BTD, state = self.mixer(x_BTD, state, **options)
        return y_BTD + 1e-9 * x_BTD.mean(dim=1, keepdim=True), state


class IgnoresDocuments(Buggy):
    def forward(self, x_BTD: torch.Tensor, state: Any = None, documents_BT: Any = None, **options: Any) -> Any:
        return self.mixer(x_BTD, state, **options)


class DetachesItsState(Buggy):
    def forward(self, x_BTD: torch.Tensor, state: Any = None, **options: Any) -> Any:
        y_BTD, state = self.mixer(x_BTD, state, **options)
        return y_BTD, state and state._map(torch.Tensor.detach)


class WritesInPlaceUnderGrad(Buggy):
    def forward(self, x_BTD: torch.Tensor, state: Any = None, **options: Any) -> Any:
        y_BTD, after = self.mixer(x_BTD, state, **options)
        if state is not None:
            state.length_B.add_(x_BTD.shape[1])
        return y_BTD, after


class MovesItsState(Buggy):
    def forward(self, x_BTD: torch.Tensor, state: Any = None, **options: Any) -> Any:
        y_BTD, state = self.mixer(x_BTD, state, **options)
        return y_BTD, state and state._map(torch.Tensor.clone)


class AddsBehindItsOutput(Buggy):
    def __init__(self, config: Any):
        super().__init__(config)
        self.out = self.mixer.out

    def forward(self, x_BTD: torch.Tensor, state: Any = None, **options: Any) -> Any:
        y_BTD, state = self.mixer(x_BTD, state, **options)
        return y_BTD + 1e-3 * x_BTD, state


@sound_mixers
def test_the_streaming_check_catches_a_window_off_by_one(config: Any):
    for field in (item.name for item in dataclasses.fields(config) if item.name.startswith("window")):
        for step in (-1, 1):
            with pytest.raises(AssertionError):
                checks.check_streaming(OtherWindowWhenStreaming(config, **{field: getattr(config, field) + step}))


@sound_mixers
def test_the_ragged_check_catches_padding_that_enters_the_state(config: Any):
    with pytest.raises(AssertionError):
        checks.check_ragged(TakesPaddingForTokens(config))


@sound_mixers
def test_the_ragged_check_catches_nan_that_leaks_from_the_padding(config: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "without_padding", lambda x_BTD, lengths_B: x_BTD)
    with pytest.raises(AssertionError):
        checks.check_ragged(checks.build(config, EVEN))


@sound_mixers
def test_the_causal_check_catches_a_glimpse_of_the_future(config: Any):
    with pytest.raises(AssertionError):
        checks.check_causal(PeeksAhead(config))


def test_the_check_of_wanted_places_catches_another_window_there():
    with pytest.raises(AssertionError):
        checks.check_wanted(OtherWindowAtPlaces(SOUND[0]))


@sound_mixers
def test_the_document_check_catches_documents_that_are_ignored(config: Any):
    with pytest.raises(AssertionError):
        checks.check_documents(IgnoresDocuments(config))


@sound_mixers
def test_the_functional_check_catches_a_cut_gradient_and_a_changed_state(config: Any):
    for mistake in (DetachesItsState, WritesInPlaceUnderGrad):
        with pytest.raises(AssertionError):
            checks.check_functional(mistake(config))


@sound_mixers
def test_the_in_place_check_catches_a_state_that_moves(config: Any):
    with pytest.raises(AssertionError):
        checks.check_in_place(MovesItsState(config))


@sound_mixers
def test_the_select_and_reset_check_catches_either_mistake(config: Any, monkeypatch: pytest.MonkeyPatch):
    for name, mistake in (
        ("reset", lambda state, rows: state),
        ("select", lambda state, rows: state._map(lambda x: x[: len(rows)])),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(State, name, mistake)
            with pytest.raises((AssertionError, RuntimeError)):
                checks.check_select_and_reset(checks.build(config, EVEN))


@sound_mixers
def test_the_output_check_catches_what_goes_round_the_last_map(config: Any):
    with pytest.raises(AssertionError):
        checks.check_output(AddsBehindItsOutput(config))


@pytest.mark.parametrize("cost", ["num_params", "state_bytes", "flops_per_token"])
@sound_mixers
def test_the_cost_check_catches_each_wrong_number(config: Any, cost: str, monkeypatch: pytest.MonkeyPatch):
    honest = getattr(type(config), cost)
    # Leaving out one projection's FLOPs, or counting one parameter or byte twice.
    error = -2 * EVEN.width**2 * 4 if cost == "flops_per_token" else 1
    monkeypatch.setattr(type(config), cost, lambda *arguments: honest(*arguments) + error)
    with pytest.raises(AssertionError):
        checks.check_counts(config, EVEN)


def test_the_backend_check_catches_a_backend_with_another_window(monkeypatch: pytest.MonkeyPatch):
    def off_by_one(*tensors: Any, window1: int, **options: Any) -> Any:
        return windowed(*tensors, window1=window1 + 1, **options)

    monkeypatch.setitem(dispatch._registered["simplicial"], "triton", dispatch.Backend(lambda: off_by_one))
    with pytest.raises(AssertionError):
        checks.check_backends(SOUND[1], EVEN)
