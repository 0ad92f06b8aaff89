import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.config import UserError
from trivium.mixers.attention import AttentionConfig
from trivium.mixers.base import MIXERS
from trivium.model.layers import format_layers, parse_layers

EXAMPLES = [example for name in MIXERS.names() for example in MIXERS.get(name).examples()]


def test_a_pattern_lists_its_mixers_first_layer_first():
    local = AttentionConfig(window=6, qk_norm=True)
    assert parse_layers("attention*2 + attention(window=6, qk_norm=true)") == (AttentionConfig(),) * 2 + (local,)


def test_spaces_and_line_breaks_do_not_matter():
    assert parse_layers(" attention ( window = 6 )*2\n+attention ") == parse_layers("attention(window=6)*2 + attention")


def test_values_are_read_as_yaml():
    assert parse_layers("attention(window=null)") == (AttentionConfig(),)
    assert parse_layers("attention(bias=yes)") == (AttentionConfig(bias=True),)
    assert parse_layers("attention(window=1.0e+1)") == parse_layers("attention(window=10)")


def test_empty_parentheses_are_the_defaults():
    assert parse_layers("attention()") == (AttentionConfig(),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the pattern is empty"),
        ("   ", "the pattern is empty"),
        ("attenton*2", r"unknown mixer 'attenton'; did you mean 'attention'\?.*at character 1 of"),
        ("attention + atention", r"unknown mixer 'atention'.*at character 13 of"),
        ("attention(windw=3)", r"unknown option 'windw' of attention; did you mean 'window'\?.*at character 11 of"),
        ("attention(kind=x)", "unknown option 'kind'"),
        ("attention(window=3, window=4)", "option 'window' of attention is given twice.*at character 21"),
        ("attention(window=three)", "attention: window: expected a whole number.*'three'"),
        ("attention(window=0)", "window: 0"),
        ("attention(window=)", "option 'window' has no value"),
        ("attention(window)", r"expected '=' after option 'window', got '\)'"),
        ("attention(window=3", "the parenthesis is never closed"),
        ("attention(window=3;qk_norm=true)", "window"),
        ("attention*0", "the count 0 is not allowed; allowed: 1 to 1000"),
        ("attention*", "expected a count, got the end"),
        ("attention*x", "expected a count, got 'x' .at character 11"),
        ("attention*999 + attention*999", "more than 1000 layers"),
        ("attention*-1", "expected a count, got '-'"),
        ("attention +", "expected the name of a mixer, got the end"),
        ("attention attention", r"expected '\+', '\*' or the end, got 'a' .at character 11"),
        ("attention(window=3))", r"expected '\+', '\*' or the end, got '\)'"),
        ("2*attention", "expected the name of a mixer, got '2'"),
    ],
)
def test_a_bad_pattern_is_refused_with_its_place(text: str, problem: str):
    with pytest.raises(UserError, match=f"^layers: .*{problem}") as caught:
        parse_layers(text)
    assert "\n" not in str(caught.value)


@given(st.lists(st.sampled_from(EXAMPLES), min_size=1, max_size=6).map(tuple))
def test_format_is_the_inverse_of_parse(layers: tuple):
    assert parse_layers(format_layers(layers)) == layers


def test_format_counts_equal_neighbours_and_leaves_defaults_out():
    local = AttentionConfig(window=6)
    assert format_layers((AttentionConfig(), AttentionConfig(), local)) == "attention*2 + attention(window=6)"


def test_text_with_the_symbols_of_the_grammar_survives_the_round_trip(monkeypatch: pytest.MonkeyPatch):
    @dataclasses.dataclass(frozen=True)
    class Labelled(AttentionConfig):
        label: str = ""

    Labelled.kind = "labelled"
    monkeypatch.setitem(MIXERS._classes, "labelled", Labelled)
    layers = (Labelled(label='a), b*2 + c\'s "d"'), Labelled(label="3"))
    assert parse_layers(format_layers(layers)) == layers
