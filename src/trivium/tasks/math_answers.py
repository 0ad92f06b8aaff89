"""Answers of competition problems as MATH has them: what stands in the last `\\boxed{}`, and when two are equal.

Equal is what math-verify says, where it is installed; without it, or beside it, what is equal once both are written in
one way, or as numbers. Neither evaluates code.
"""

import importlib.util
import logging
import re
import threading
from fractions import Fraction
from functools import cache

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\s\w])")
_NOTHING = re.compile(r"\\left|\\right|\\[!,;: ]|\\displaystyle|\\\$|\$|\\%|%|\^\{?\\circ\}?|\\degree|\s+")
_FRACTION = re.compile(r"\\[dtc]?frac")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|textrm)\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d}])\\(?:text|mathrm|mbox)\{\s*[A-Za-z .^0-9]*\}(?:\^\{?\d\}?)?$")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_EQUATION = re.compile(r"^[A-Za-z]=(?=.)")
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)")
_RATIO = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}|(-?\d+)/(-?\d+)()()")
LONGEST = 300  # characters of an answer that is read as a number, and that math-verify is asked about
SECONDS = 5  # that it may take for one

_log = logging.getLogger("trivium")


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{}` (or `\fbox{}`, or `\boxed 5`) of `text`; None if none is closed."""
    span = boxed_span(text)
    return None if span is None else text[span[0] : span[1]].strip()


def boxed_span(text: str) -> tuple[int, int] | None:
    r"""Return where the content of the last closed `\boxed{}` begins and ends in `text`; None without one."""
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        if start < len(text) and text[start] != "{":
            end = start + len(re.match(r"\S*?(?=[\s$.,]|$)", text[start:])[0])  # pyright: ignore[reportOptionalSubscript]
            return (start, end) if end > start else None
        depth = 0
        for place in range(start, len(text)):
            if text[place] in "{}" and text[place - 1] != "\\":
                depth += 1 if text[place] == "{" else -1
                if depth == 0:
                    return start + 1, place
        # An opened box that is not closed is no answer, and what stood in one before it was not the last.
        return None
    return None


def normalised(answer: str) -> str:
    """Return an answer in one way of writing: no blanks, units, currency and percent signs, one kind of fraction."""
    answer = _UNIT.sub("", answer.strip().rstrip("."))
    answer = _NOTHING.sub("", _WORDS.sub(r"\1", answer))
    answer = _FRACTION.sub(r"\\frac", answer)
    answer = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", answer)
    answer = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", answer)
    return _EQUATION.sub("", _GROUPED.sub("", answer))


def value_of(answer: str) -> Fraction | None:
    r"""Return the value of a normalised number, decimal, `a/b` or `\frac{a}{b}`; None if it is none of these, or longer
    than LONGEST."""
    if len(answer) > LONGEST:  # Python reads no number of thousands of digits, which a model that repeats itself writes
        return None
    if _NUMBER.fullmatch(answer):
        return Fraction(answer)
    found = _RATIO.fullmatch(answer)
    if found is None:
        return None
    above, below = (found[2], found[3]) if found[2] is not None else (found[4], found[5])
    if int(below) == 0:
        return None
    return (-1 if found[1] == "-" else 1) * Fraction(int(above), int(below))


def equal_as_text(given: str, wanted: str) -> bool:
    """Say whether two answers are equal once they are written in one way, or are the same number."""
    first, second = normalised(given), normalised(wanted)
    if first == second:
        return first != ""
    values = value_of(first), value_of(second)
    return values[0] is not None and values[0] == values[1]


@cache
def has_math_verify() -> bool:
    """Say whether math-verify is installed, and announce once what answers are compared by."""
    found = importlib.util.find_spec("math_verify") is not None
    if found:
        _log.info("answers are compared by math-verify")
    else:
        _log.warning(
            "answers are compared as text, since math-verify is missing; pip install 'trivium[score]' brings it"
        )
    return found


@cache
def _warn_thread() -> None:
    _log.warning("math-verify bounds its time in the main thread alone; here answers are compared as text")


def math_verify_reads(given: str, wanted: str) -> bool:
    """Say whether math-verify is asked about two answers: not beyond LONGEST characters, and not outside of the main
    thread, where nothing would stop it."""
    if max(len(given), len(wanted)) > LONGEST:
        return False
    if threading.current_thread() is not threading.main_thread():
        _warn_thread()
        return False
    return True


def equal_by_math_verify(given: str, wanted: str) -> bool:
    """Say whether math-verify finds two answers equal; what it cannot read, or not in seconds, is not.

    What it is not asked about, see `math_verify_reads`, is compared as text.
    """
    if not math_verify_reads(given, wanted):
        return equal_as_text(given, wanted)
    import math_verify

    try:
        first, second = (
            math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=SECONDS, raise_on_error=False)
            for answer in (wanted, given)
        )
        return bool(math_verify.verify(first, second, timeout_seconds=SECONDS, raise_on_error=False))
    except Exception as error:  # of the parsers inside: an answer that cannot be read is wrong, never a crash
        _log.info("math-verify cannot compare %r with %r: %s", given, wanted, type(error).__name__)
        return False


def equal(given: str, wanted: str) -> bool:
    """Say whether two answers are equal: by math-verify if it is installed, otherwise as text."""
    return equal_as_text(given, wanted) or (has_math_verify() and equal_by_math_verify(given, wanted))
