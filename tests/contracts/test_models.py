"""Every registered model keeps the contract; beside each check its twin, a planted bug that the check must catch."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.contracts import model_checks as checks
from trivium.model.base import MODELS, ModelConfig, ModelContext
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.tasks.addition import AdditionConfig

CONTEXT = ModelContext(vocab_size=14, max_length=13, digit_ids=tuple(range(10)), closing_ids=(10,))
EXAMPLES = [example for name in MODELS.names() for example in MODELS.get(name).examples()]
BEHAVIOURS = (
    checks.check_streaming,
    checks.check_ragged,
    checks.check_causal,
    checks.check_wanted,
    checks.check_documents,
    checks.check_functional,
    checks.check_in_place,
    checks.check_select_and_reset,
)


def describe(value: Any) -> str:
    if isinstance(value, ModelConfig):
        return f"{value.kind}{EXAMPLES.index(value)}"
    return getattr(value, "__name__", str(value)).removeprefix("check_")


def build(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = config.build(CONTEXT).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases at 1 and 0 would hide a mistake with them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", EXAMPLES, ids=describe)
@pytest.mark.parametrize("check", BEHAVIOURS, ids=describe)
def test_a_model_keeps_the_contract_in_float64(check: Any, config: ModelConfig):
    check(build(config), CONTEXT)


@pytest.mark.parametrize("config", EXAMPLES, ids=describe)
def test_a_model_keeps_the_contract_in_float32(config: ModelConfig):
    model = build(config, torch.float32)
    checks.check_streaming(model, CONTEXT)
    checks.check_ragged(model, CONTEXT)
    checks.check_functional(model, CONTEXT)


@pytest.mark.parametrize("config", EXAMPLES, ids=describe)
def test_a_model_costs_what_its_config_says(config: ModelConfig):
    checks.check_counts(config, CONTEXT)


@pytest.mark.parametrize("config", EXAMPLES, ids=describe)
def test_a_step_can_be_captured_since_it_never_waits_for_the_device(config: ModelConfig):
    checks.check_never_waits(config, CONTEXT)


@pytest.mark.parametrize("config", EXAMPLES, ids=describe)
def test_a_saved_model_comes_back_exactly(config: ModelConfig, tmp_path: Any):
    task_config = AdditionConfig(max_digits=2)
    context = model_context(task_config.build(), config)
    context = ModelContext(context.vocab_size, 13, context.digit_ids, closing_ids=context.closing_ids)
    for dtype in (torch.float32, torch.float64):
        model = config.build(context).to(dtype)
        checks.check_save_and_load(model, task_config, tmp_path / str(dtype))


class Buggy(nn.Module):
    """A sound model with one mistake."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = model.config

    def init_state(self, *arguments: Any, **options: Any) -> Any:
        return self.model.init_state(*arguments, **options)

    def forward(self, tokens_BT: Any, state: Any = None, **options: Any) -> Any:
        return self.model(tokens_BT, state, **options)


class ForgetsDigitRuns(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, **options: Any) -> Any:
        if state is not None:
            state.run_B = torch.zeros_like(state.run_B)
        return self.model(tokens_BT, state, **options)


class IgnoresLengths(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, *, lengths_B: Any = None, **options: Any) -> Any:
        return self.model(tokens_BT[:, :1] if state is not None else tokens_BT, state, **options)


class CountsPaddingAsDigits(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, *, lengths_B: Any = None, **options: Any) -> Any:
        logits, state = self.model(tokens_BT, state, lengths_B=lengths_B, **options)
        if state is not None:
            state.run_B += 1
        return logits, state


class LooksAhead(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, **options: Any) -> Any:
        logits, state = self.model(tokens_BT, state, **options)
        return logits + 1e-6 * logits.mean(dim=1, keepdim=True), state


class GivesTheNextPlace(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, *, wanted_N: Any = None, **options: Any) -> Any:
        moved_N = None if wanted_N is None else (wanted_N + 1) % tokens_BT.numel()
        return self.model(tokens_BT, state, wanted_N=moved_N, **options)


class MixesDocuments(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, *, documents_BT: Any = None, **options: Any) -> Any:
        return self.model(tokens_BT, state, **options)


class CutsGradients(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, **options: Any) -> Any:
        logits, state = self.model(tokens_BT, state, **options)
        return logits, None if state is None else state._map(torch.Tensor.detach)


class WritesIntoTheOldState(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, **options: Any) -> Any:
        logits, new = self.model(tokens_BT, state, **options)
        if state is not None:
            state.lengths_B.copy_(new.lengths_B)
        return logits, new


class Reallocates(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, **options: Any) -> Any:
        logits, state = self.model(tokens_BT, state, **options)
        return logits, state._map(torch.Tensor.clone)


class ResetsTheWrongRow(Buggy):
    def forward(self, tokens_BT: Any, state: Any = None, **options: Any) -> Any:
        logits, state = self.model(tokens_BT, state, **options)
        if state is not None:
            reset = state.reset
            state.reset = lambda rows: reset(rows - 1)
        return logits, state


@pytest.mark.parametrize(
    ("check", "bug"),
    [
        (checks.check_streaming, ForgetsDigitRuns),
        (checks.check_ragged, IgnoresLengths),
        (checks.check_ragged, CountsPaddingAsDigits),
        (checks.check_causal, LooksAhead),
        (checks.check_wanted, GivesTheNextPlace),
        (checks.check_documents, MixesDocuments),
        (checks.check_functional, CutsGradients),
        (checks.check_functional, WritesIntoTheOldState),
        (checks.check_in_place, Reallocates),
        (checks.check_select_and_reset, ResetsTheWrongRow),
    ],
    ids=describe,
)
def test_a_planted_bug_is_caught(check: Any, bug: Any):
    model = build(DecoderConfig(width=24, heads=2, positions="block"))
    check(model, CONTEXT)
    with pytest.raises((AssertionError, RuntimeError)):
        check(bug(model), CONTEXT)


@dataclass(frozen=True)
class Miscounted(DecoderConfig):
    """A decoder that reports more of one thing than it has."""

    wrong: str = ""

    def num_params(self, context: ModelContext) -> int:
        return super().num_params(context) + (self.wrong == "parameters")

    def flops_per_token(self, context: ModelContext, length: int) -> float:
        return super().flops_per_token(context, length) + 2 * self.width * (self.wrong == "flops")

    def state_bytes(self, context: ModelContext, length: int, dtype: torch.dtype) -> int:
        return super().state_bytes(context, length, dtype) + 8 * (self.wrong == "bytes")


@dataclass(frozen=True)
class Waiting(DecoderConfig):
    """A decoder that asks the device how far the rows are."""

    def build(self, context: ModelContext) -> Any:
        model = super().build(context)
        model.register_forward_pre_hook(lambda module, inputs: inputs[1].lengths_B.max().item())
        return model


def test_waiting_for_the_device_is_caught():
    checks.check_never_waits(DecoderConfig(), CONTEXT)
    with pytest.raises(RuntimeError, match="meta"):
        checks.check_never_waits(Waiting(), CONTEXT)


@pytest.mark.parametrize("wrong", ["parameters", "flops", "bytes"])
def test_a_wrong_count_is_caught(wrong: str):
    checks.check_counts(Miscounted(), CONTEXT)
    with pytest.raises(AssertionError):
        checks.check_counts(Miscounted(wrong=wrong), CONTEXT)


def test_a_save_that_rounds_is_caught(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    task_config = AdditionConfig(max_digits=2)
    model = DecoderConfig(max_length=13).build(model_context(task_config.build(), DecoderConfig(max_length=13)))
    save = checks.save_model

    def save_rounded(folder: Any, model: Any, task_config: Any) -> None:
        rounded = DecoderConfig(max_length=13).build(model.context)
        rounded.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
        save(folder, rounded, task_config)

    monkeypatch.setattr(checks, "save_model", save_rounded)
    with pytest.raises(AssertionError):
        checks.check_save_and_load(model, task_config, tmp_path / "model")
