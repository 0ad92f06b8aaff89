"""Where the chain of thought ends and the answer begins, and when an answer is right."""

from trivium.tasks.base import ANSWER, CHAIN, PROMPT, Example, Verdict
from trivium.tasks.byte_pairs import Vocabulary

THINK, THINK_END = "<think>", "</think>"


def chain_regions(alphabet: Vocabulary, example: Example) -> list[int]:
    """Return the region of each token: the chain runs from the prompt's end through `</think>`."""
    prompt, total = len(alphabet.encode(example.prompt)), len(alphabet.encode(example.answer))
    chain, closing, _ = example.answer.partition(THINK_END)
    # Byte pairs may join the bracket's end to what follows it; then there are fewer tokens than in the parts alone.
    inside = min(len(alphabet.encode(chain + closing)), total) if closing else 0
    return [PROMPT] * prompt + [CHAIN] * inside + [ANSWER] * (total - inside)


def strip_end(alphabet: Vocabulary, text: str) -> tuple[str, bool]:
    """Return (text without the end and pad symbols that close it, whether an end symbol closed it)."""
    ended = False
    while True:
        if text.endswith(alphabet.end):
            text, ended = text[: -len(alphabet.end)], True
        elif text.endswith(alphabet.pad):
            text = text[: -len(alphabet.pad)]
        else:
            return text, ended


def judge(alphabet: Vocabulary, example: Example, text: str) -> Verdict:
    """Compare the answers of `text` and `example`, which stand between `</think>`, if any, and the end symbol.

    Equality is exact: a prefix, an extension or an answer without end is wrong, and so is text before `<think>`. A
    prompt left in front of `text` is taken off, unless the wanted text begins with the same.
    """
    wanted = strip_end(alphabet, example.answer)[0]
    if not wanted.startswith(example.prompt):
        text = text.removeprefix(example.prompt)
    body, ended = strip_end(alphabet, text)
    chain, closing, answer = body.partition(THINK_END)
    # A wanted chain without `<think>` at its start was opened by the prompt.
    opened = THINK_END in wanted and not wanted.startswith(THINK)
    if not closing:
        answer = body
        if body.startswith(THINK):
            return Verdict(False, None, f"the chain has no {THINK_END}")
    elif not opened and not chain.startswith(THINK):
        return Verdict(False, None, f"the chain does not start with {THINK}")
    expected = wanted.partition(THINK_END)[2] if THINK_END in wanted else wanted
    if not ended:
        return Verdict(False, answer or None, "the answer does not end")
    if answer != expected:
        return Verdict(False, answer, f"{expected} is right")
    return Verdict(True, answer)
