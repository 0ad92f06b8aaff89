from fractions import Fraction

import pytest

from trivium.tasks.calculator import annotations, evaluate, holds


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", 24),
        ("48 + 24", 72),
        ("2*(3+4)-1", 13),
        ("1+2*3", 7),
        ("8/4/2", 1),
        ("10-2-3", 5),
        ("-3+5", 2),
        ("2*-3", -6),
        ("12/60", Fraction(1, 5)),
        ("0.2*50", 10),
        (".5+1.", Fraction(3, 2)),
        ("1,000*2", 2000),
        ("12,345,678", 12345678),
        ("((((1))))", 1),
    ],
)
def test_an_expression_has_its_exact_value(expression: str, value: Fraction):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "text",
    ["", "  ", "1/0", "1+", "+1", "(1", "1)", "1 2", "2**3", "x+1", "1,00", "__import__('os')", "(" * 400, "-" * 90],
)
def test_what_is_no_expression_has_no_value(text: str):
    assert evaluate(text) is None


def test_annotations_are_found_in_their_order():
    text = "Sold 48/2 = <<48/2=24>>24 clips, $<<12/60=0.2>>0.2, <<broken>> <<a=b=c>>"
    assert annotations(text) == [("48/2", "24"), ("12/60", "0.2")]


@pytest.mark.parametrize(
    ("expression", "result", "right"),
    [
        ("48/2", "24", True),
        ("48/2", "24.0", True),
        ("48/2", "25", False),
        ("2/3", "0.67", True),
        ("2/3", "0.66", False),
        ("2/3", "1", False),
        ("1/2", "half", False),
        ("1/0", "1", False),
    ],
)
def test_a_step_holds_to_the_digits_that_it_is_written_with(expression: str, result: str, right: bool):
    assert holds(expression, result) == right
