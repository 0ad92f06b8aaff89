"""The calculator of word problems: the value of an expression, and the steps `<<48/2=24>>` that a solution annotates.

Values are exact fractions; nothing is handed to Python to evaluate.
"""

import re
from fractions import Fraction

_TOKEN = re.compile(r"\s*(?:(\d+(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+\.?)|([-+*/()]))")
_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
LONGEST = 200  # characters of an expression that is looked at
DEEPEST = 50  # parentheses and signs inside one another


def evaluate(expression: str) -> Fraction | None:
    """Return the value of + - * / and parentheses over numbers; None if it is no such expression or divides by 0."""
    tokens = _tokens(expression)
    if tokens is None:
        return None
    try:
        value, place = _sum(tokens, 0, 0)
    except (_NotAnExpressionError, ZeroDivisionError):
        return None
    return value if place == len(tokens) else None


def annotations(text: str) -> list[tuple[str, str]]:
    """Return (expression, result) of every `<<expression=result>>` in `text`, as they are written."""
    return [(left.strip(), right.strip()) for left, right in _ANNOTATION.findall(text)]


def holds(expression: str, result: str) -> bool:
    """Say whether `result`, a number, is the value of `expression`, to the digits that it is written with."""
    value, given = evaluate(expression), evaluate(result)
    if value is None or given is None:
        return False
    places = len(result.partition(".")[2])
    return value == given or (places > 0 and abs(value - given) <= Fraction(1, 2 * 10**places))


class _NotAnExpressionError(Exception):
    """The tokens are not an expression."""


def _tokens(expression: str) -> list[str] | None:
    expression = expression.strip()
    if not expression or len(expression) > LONGEST:
        return None
    tokens, place = [], 0
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if match is None:
            return None
        tokens.append(match[1] or match[2])
        place = match.end()
    return tokens


def _sum(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    value, place = _product(tokens, place, depth)
    while place < len(tokens) and tokens[place] in "+-":
        sign = 1 if tokens[place] == "+" else -1
        term, place = _product(tokens, place + 1, depth)
        value += sign * term
    return value, place


def _product(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    value, place = _factor(tokens, place, depth)
    while place < len(tokens) and tokens[place] in "*/":
        operator = tokens[place]
        factor, place = _factor(tokens, place + 1, depth)
        value = value * factor if operator == "*" else value / factor
    return value, place


def _factor(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    if place == len(tokens) or depth > DEEPEST:
        raise _NotAnExpressionError
    token = tokens[place]
    if token == "-":
        value, place = _factor(tokens, place + 1, depth + 1)
        return -value, place
    if token == "(":
        value, place = _sum(tokens, place + 1, depth + 1)
        if place == len(tokens) or tokens[place] != ")":
            raise _NotAnExpressionError
        return value, place + 1
    if token in "+*/)":
        raise _NotAnExpressionError
    return Fraction(token.replace(",", "").rstrip(".") or "0"), place + 1
