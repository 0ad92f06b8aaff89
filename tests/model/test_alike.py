"""A batch in which tokens recur gives what it gives one token at a time, with less work."""

from typing import Any

import pytest
import torch

from trivium.model import decoder
from trivium.model.alike import find_alike
from trivium.model.base import ModelContext
from trivium.model.decoder import DecoderConfig

CONTEXT = ModelContext(vocab_size=7, max_length=6, digit_ids=(0, 1, 2))
ROWS = 40  # times 6 places, four times the distinct tokens and more


def _model(**options) -> Any:
    torch.manual_seed(0)
    return DecoderConfig(width=24, heads=2, **options).build(CONTEXT).double()


def _run(model, tokens_BT, wanted_N):
    logits, _ = model(tokens_BT, wanted_N=wanted_N)
    model.zero_grad()
    (logits**2).sum().backward()
    return logits, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "none"])
@pytest.mark.parametrize(
    "layers", ["attention*2", "attention(window=2, kv_heads=1, qk_norm=true) + attention", "gru*2"]
)
def test_logits_and_gradients_are_those_of_every_token_by_itself(monkeypatch, positions, layers):
    model = _model(layers=layers, positions=positions)
    tokens_BT, wanted_N = torch.randint(7, (ROWS, 6)), torch.arange(3, ROWS * 6, 3)
    found = []

    def look(*given):
        found.append(find_alike(*given))
        return found[-1]

    monkeypatch.setattr(decoder, "find_alike", look)
    logits, grads = _run(model, tokens_BT, wanted_N)
    assert found[0] is not None
    monkeypatch.setattr(decoder, "find_alike", lambda *given: None)
    expected, expected_grads = _run(model, tokens_BT, wanted_N)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)


def test_the_first_projection_reads_each_distinct_token_once(monkeypatch):
    model, seen = _model(layers="attention*2", positions="learned"), []
    model.blocks[0].mixer.qkv.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    model(torch.randint(7, (ROWS, 6)))
    model(torch.randint(7, (2, 6)))
    assert seen == [(7 * 6, 24), (2, 6, 24)]


def test_a_mixer_or_embedding_that_is_watched_sees_every_token():
    model, seen = _model(layers="attention*2", positions="learned"), []
    tokens_BT = torch.randint(7, (ROWS, 6))
    for module in (model.blocks[0].mixer, model.embedding):
        handle = module.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[:2]))
        model(tokens_BT)
        handle.remove()
    assert seen == [(ROWS, 6)] * 2


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"checkpoint_activations": True}, {"layers": "attention"}])
def test_what_must_differ_from_token_to_token_or_gains_nothing_is_left_alone(monkeypatch, options):
    def fail(*given):
        raise AssertionError("looked for tokens that are alike")

    monkeypatch.setattr(decoder, "find_alike", fail)
    _model(**{"layers": "attention*2", "positions": "learned", **options})(torch.randint(7, (ROWS, 6)))


def test_a_symbol_that_the_alphabet_lacks_is_refused_all_the_same():
    with pytest.raises(IndexError):
        _model(layers="attention*2", positions="learned")(torch.full((ROWS, 6), 7))


def test_a_text_longer_than_the_table_is_refused_all_the_same():
    with pytest.raises(ValueError, match="at most 6"):
        _model(layers="attention*2", positions="learned")(torch.zeros(ROWS, 7, dtype=torch.int64))
