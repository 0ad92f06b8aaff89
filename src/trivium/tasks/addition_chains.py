"""Generated texts of sums: is the answer right, is each step of the chain true, and does the answer follow from it?"""

import re

import numpy as np

from trivium.tasks.addition_formats import DIGITS, Notation
from trivium.tasks.answers import THINK, THINK_END, judge, strip_end
from trivium.tasks.base import Example, Step, Verdict


def verify(notation: Notation, example: Example, text: str) -> Verdict:
    """See `Addition.verify`."""
    if example.answer:
        return judge(notation.alphabet, example, text)
    # In a half problem the + that ends a delimited prompt is the one after as many numbers as the task has.
    whole = example.prompt + text
    shape = r"\+" + r"\w+\+" * notation.operands if notation.format == "delimited" else r"[\w+]*="
    match = re.match(shape, whole)
    if match is None:
        return Verdict(False, None, "the problem was not completed")
    try:
        operands, complete = notation.read_prompt(match.group())
    except ValueError:
        return Verdict(False, None, f"{match.group()!r} is not a problem")
    if not complete:
        return Verdict(False, None, f"{match.group()!r} is not a problem")
    problem = Example("", notation.write_answer(operands))
    return judge(notation.alphabet, problem, whole[match.end() :])


def _chain_of(text: str) -> str | None:
    """Return what stands between the chain's brackets; None without a finished chain."""
    match = re.search(f"{re.escape(THINK)}(.*?){re.escape(THINK_END)}", text, flags=re.DOTALL)
    return match.group(1) if match else None


def _is_true(notation: Notation, step: str) -> bool:
    left, _, right = step.partition("=")
    least_first = notation.format == "reversed_chain"
    try:
        terms = [notation.read_number(term, least_first) for term in left.split("+")]
        return len(terms) > 1 and sum(terms) == notation.read_number(right, least_first)
    except ValueError:
        return False


def steps(notation: Notation, text: str) -> list[Step]:
    """Return the steps of the chain in `text`, also of one that was cut off; [] where there is none."""
    _, opening, chain = text.partition(THINK)
    chain = strip_end(notation.alphabet, chain.partition(THINK_END)[0])[0]
    if not opening or not notation.has_chain or not chain:
        return []
    parts = chain.split(notation.separator) if notation.format == "column" else [chain]
    return [Step(part, _is_true(notation, part)) for part in parts]


def answer_from_steps(notation: Notation, text: str) -> str | None:
    """Return the answer that the chain in `text` leads to, true or not; None where it leads to none.

    In a column chain that is the last digit of every result, and all of the final one.
    """
    chain = _chain_of(text)
    if chain is None or not notation.has_chain:
        return None
    results = [step.text.partition("=")[2] for step in steps(notation, text)]
    digits = DIGITS[: notation.base]
    if not results or any(not result or set(result) - set(digits) for result in results):
        return None
    if notation.format == "reversed_chain":
        answer = results[0][::-1]
    else:
        answer = results[-1] + "".join(result[-1] for result in results[-2::-1])
    if notation.width or notation.aligned:
        return answer.rjust(notation.answer_width(max(notation.width, len(results))), "0")
    return answer.lstrip("0") or "0"


def corrupt_step(notation: Notation, text: str, rng: np.random.Generator) -> str | None:
    """Return `text` with one digit of one step's result changed, so that another answer follows from the chain.

    In a column chain the changed digit is the last of a result, so that one digit of the answer changes with it. None
    when `text` has no finished chain with a digit to change.
    """
    match = re.search(f"{re.escape(THINK)}.*?{re.escape(THINK_END)}", text, flags=re.DOTALL)
    if match is None or not notation.has_chain:
        return None
    digits = DIGITS[: notation.base]
    if notation.format == "column":
        pattern = f"=[{digits}]*([{digits}])(?={re.escape(notation.separator)}|{re.escape(THINK_END)})"
    else:
        pattern = f"([{digits}])(?=[{digits}]*{re.escape(THINK_END)})"
    places = [match.start() + found.start(1) for found in re.finditer(pattern, match.group())]
    if not places:
        return None
    place = places[int(rng.integers(len(places)))]
    others = [digit for digit in digits if digit != text[place]]
    return text[:place] + others[int(rng.integers(len(others)))] + text[place + 1 :]
