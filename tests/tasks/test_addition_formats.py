"""The worked examples of the specification, and what people may type."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.config import UserError
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.addition_formats import digits_of, number_of


@pytest.mark.parametrize(
    ("config", "operands", "text"),
    [
        ({"format": "plain"}, (99, 21), "99+21=120<end>"),
        ({"format": "reversed"}, (99, 21), "99+12=021<end>"),
        ({"format": "delimited", "base": 16}, (1342, 879), "+E35+F63+DA8+"),
        ({"format": "delimited"}, (101, 1002), "+101+2001+3011+"),
        ({"format": "delimited"}, (21, 378), "+12+873+993+"),
        ({"format": "column"}, (3, 5), "3+5=8<end>"),
        ({"format": "column"}, (12, 34), "12+34=<think>2+4=6 1+3=4</think>46<end>"),
        ({"format": "column"}, (99, 21), "99+21=<think>9+1=10 9+2+1=12</think>120<end>"),
        ({"format": "column"}, (5, 99), "5+99=<think>5+9=14 0+9+1=10</think>104<end>"),
        ({"format": "column"}, (18, 9), "18+9=<think>8+9=17 1+0+1=2</think>27<end>"),
        ({"format": "column"}, (658, 189), "658+189=<think>8+9=17 5+8+1=14 6+1+1=8</think>847<end>"),
        ({"format": "column"}, (999, 999), "999+999=<think>9+9=18 9+9+1=19 9+9+1=19</think>1998<end>"),
        ({"format": "reversed_chain"}, (99, 21), "99+21=<think>99+12=021</think>120<end>"),
        # Three and more operands: the incoming carry is one more term, and may exceed 1.
        ({"format": "column", "operands": 3}, (99, 99, 99), "99+99+99=<think>9+9+9=27 9+9+9+2=29</think>297<end>"),
        ({"format": "column", "operands": 3}, (1, 2, 3), "1+2+3=6<end>"),
        ({"format": "column", "operands": 3}, (12, 3, 9), "12+3+9=<think>2+3+9=14 1+0+0+1=2</think>24<end>"),
        (
            {"format": "column", "base": 2, "operands": 4},
            (3, 3, 3, 3),
            "11+11+11+11=<think>1+1+1+1=100 1+1+1+1+10=110</think>1100<end>",
        ),
        ({"format": "column", "base": 16}, (0xFF, 0x1), "FF+1=<think>F+1=10 F+0+1=10</think>100<end>"),
        ({"format": "column", "separator": "_"}, (12, 34), "12+34=<think>2+4=6_1+3=4</think>46<end>"),
        ({"format": "plain", "zero_pad": True}, (9, 21), "009+021=0030<end>"),
        ({"format": "reversed", "zero_pad": True}, (9, 21), "900+120=0300<end>"),
        ({"format": "delimited", "zero_pad": True, "operands": 12}, (1,) * 12, "+" + "100+" * 12 + "21000+"),
        ({"format": "column", "zero_pad": True, "max_digits": 2}, (3, 5), "03+05=<think>3+5=8 0+0=0</think>008<end>"),
        ({"format": "reversed", "align": True}, (9, 21), "90+12=030<end>"),
        ({"format": "reversed", "align": True}, (9, 1), "9+1=01<end>"),
        ({"format": "plain", "align": True, "operands": 12}, (1,) * 11 + (95,), "01+" * 11 + "95=0106<end>"),
        ({"format": "column", "align": True}, (3, 15), "03+15=<think>3+5=8 0+1=1</think>018<end>"),
        ({"format": "plain"}, (10**30, 1), f"{10**30}+1={10**30 + 1}<end>"),
    ],
)
def test_a_worked_example_is_written_as_specified(config, operands, text):
    assert AdditionConfig(**config).build().render(*operands) == text


def test_chain_formats_have_the_vocabulary_of_the_specification():
    alphabet = AdditionConfig(format="column").build().alphabet
    assert set(alphabet.symbols) == {*"0123456789+=", "<end>", "<think>", "</think>", "<noop>", " "}
    assert alphabet.end == alphabet.pad == "<end>"


def test_a_chain_can_be_encoded_with_its_separator():
    # A published format had a space that its vocabulary lacked.
    task = AdditionConfig(format="column").build()
    text = task.render(99, 21)
    assert task.alphabet.decode(task.alphabet.encode(text)) == text
    assert " " in text


def test_tags_count_digits_carries_and_the_longest_chain_of_carries():
    task = AdditionConfig(max_digits=6).build()
    assert task.example_of([905056, 109057]).tags == {"digits": 6, "carries": 4, "longest_carry_chain": 2}
    assert task.example_of([1, 2]).tags == {"digits": 1, "carries": 0, "longest_carry_chain": 0}
    assert AdditionConfig(operands=3).build().example_of([5, 5, 5]).tags["operands"] == 3


@pytest.mark.parametrize(
    ("config", "typed", "prompt", "answer"),
    [
        ({"format": "plain"}, "99+21", "99+21=", "120<end>"),
        ({"format": "plain"}, " 99 + 21 = ", "99+21=", "120<end>"),
        ({"format": "plain"}, "7+", "7+", ""),
        ({"format": "plain"}, "7", "7", ""),
        ({"format": "reversed"}, "99+21", "99+12=", "021<end>"),
        ({"format": "reversed"}, "12+", "21+", ""),
        ({"format": "delimited"}, "12+", "+21+", ""),
        ({"format": "delimited", "base": 16}, "53e+36f", "+E35+F63+", "DA8+"),
        ({"format": "plain", "operands": 3}, "1+2", "1+2", ""),
        ({"format": "plain", "operands": 3}, "1+2+", "1+2+", ""),
        ({"format": "plain", "operands": 3}, "1+2+3", "1+2+3=", "6<end>"),
        ({"format": "plain", "zero_pad": True}, "7+", "007+", ""),
        ({"format": "plain"}, "12345+007", "12345+7=", "12352<end>"),
    ],
)
def test_a_typed_expression_becomes_the_prompt_that_the_model_knows(config, typed, prompt, answer):
    example = AdditionConfig(**config).build().parse(typed)
    assert (example.prompt, example.answer) == (prompt, answer)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "a number is missing"),
        ("+", "a number is missing"),
        ("=", "a number is missing"),
        ("5+=", "a number is missing"),
        ("5++3", "a number is missing"),
        ("1+2+3", "has 3 numbers"),
        ("1+2+", "has 2 numbers"),
        ("12=", "has 1 numbers"),
        ("1+2=3", "nothing may follow the ="),
        ("1-2", "character '-' at place 2"),
        ("1+A", "character 'A' at place 3"),
        (" 1 - 2", "character '-' at place 4"),
    ],
)
def test_an_expression_of_another_shape_is_refused(typed, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")) as error:
        AdditionConfig(format="plain").build().parse(typed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("typed", ["ß+1", "ı+1", "ſ+1", "１+1", "²+1", "1\t+1"])
def test_a_character_that_resembles_a_digit_is_refused_as_it_was_typed(typed):
    character = next(character for character in typed if character not in "1+")
    with pytest.raises(UserError) as error:
        AdditionConfig(format="plain", base=36).build().parse(typed)
    assert f"character {character!r}" in str(error.value)


FORMATS = st.sampled_from(["plain", "reversed", "delimited", "column", "reversed_chain"])
NUMBERS = st.integers(min_value=0, max_value=10**25)


@given(FORMATS, st.integers(2, 36), st.lists(NUMBERS, min_size=2, max_size=4), st.booleans())
def test_what_is_rendered_is_read_back_and_verified(format, base, operands, zero_pad):
    config = AdditionConfig(format=format, base=base, operands=len(operands), max_digits=12, zero_pad=zero_pad)
    task = config.build()
    example = task.example_of(operands)
    assert task.operands_of(example) == operands
    assert task.canonical(example) == tuple(sorted(operands))
    assert task.verify(example, example.answer).correct
    assert not task.verify(example, example.answer.removesuffix(task.alphabet.end)).correct
    typed = "+".join(task.notation.write_number(operand) for operand in operands)
    assert task.parse(typed) == example
    assert (
        task.alphabet.decode(task.alphabet.encode(example.prompt + example.answer)) == example.prompt + example.answer
    )
    assert all(step.true for step in task.steps(example, example.answer))


@given(st.integers(2, 36), st.integers(0, 10**40))
def test_digits_and_numbers_are_inverse(base, number):
    assert number_of(digits_of(number, base), base) == number


@pytest.mark.parametrize("power", [1, 2, 3_000, 5_000])  # Python prints no number of 5,000 digits
def test_decimal_digits_are_read_off_numbers_of_any_size(power):
    assert digits_of(7 * 10**power + 1, 10) == [1, *[0] * (power - 1), 7]
    for number in (0, 9, 10, 1203, 10**power + 7):
        assert number_of(digits_of(number, 10), 10) == number
