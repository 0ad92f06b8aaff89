"""Where the chain of thought ends and the answer begins, and when an answer is right."""

from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import ANSWER, CHAIN, PROMPT, Example, Verdict

THINK, THINK_END = "<think>", "</think>"


def chain_regions(alphabet: Alphabet, example: Example) -> list[int]:
    """Return the region of each token: the chain runs from the prompt's end through `</think>`."""
    chain, closing, answer = example.answer.partition(THINK_END)
    if not closing:
        chain, answer = "", example.answer
    lengths = [len(alphabet.encode(part)) for part in (example.prompt, chain + closing, answer)]
    return [PROMPT] * lengths[0] + [CHAIN] * lengths[1] + [ANSWER] * lengths[2]


def strip_end(alphabet: Alphabet, text: str) -> tuple[str, bool]:
    """Return (text without the end and pad symbols that close it, whether an end symbol closed it)."""
    ended = False
    while True:
        if text.endswith(alphabet.end):
            text, ended = text[: -len(alphabet.end)], True
        elif text.endswith(alphabet.pad):
            text = text[: -len(alphabet.pad)]
        else:
            return text, ended


def judge(alphabet: Alphabet, wanted: str, text: str) -> Verdict:
    """Compare the answers of `text` and `wanted`, which stand between `</think>`, if any, and the end symbol.

    Equality is exact: a prefix, an extension or an answer without end is wrong.
    """
    body, ended = strip_end(alphabet, text)
    _, closing, answer = body.partition(THINK_END)
    if not closing:
        answer = body
        if body.startswith(THINK):
            return Verdict(False, None, f"the chain has no {THINK_END}")
    expected = strip_end(alphabet, wanted)[0]
    if THINK_END in expected:
        expected = expected.partition(THINK_END)[2]
    if not ended:
        return Verdict(False, answer or None, "the answer does not end")
    if answer != expected:
        return Verdict(False, answer, f"{expected} is right")
    return Verdict(True, answer)
