"""Greedy decoding with a calculator: what a model writes as `<<expression=` is completed with the expression's value.

That makes another metric than the model's own arithmetic (Cobbe et al., arXiv 2110.14168, decode in this way), and it
is reported under a name of its own. Shapes: B rows, T tokens of the longest prompt, V vocabulary.
"""

import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from trivium.config import UserError
from trivium.generate.captured import DecodeSteps
from trivium.generate.engine import check_length, evaluating, longest_input
from trivium.generate.sampling import device_of
from trivium.model.base import LanguageModel
from trivium.tasks.byte_pairs import Vocabulary
from trivium.tasks.calculator import evaluate

LOOKED_AT = 96  # tokens at the end of an answer in which an expression may begin
PLACES = 6  # of a decimal fraction that is written out; one that goes on is rounded to CENTS
CENTS = 2
_OPEN = re.compile(r"<<([^<>=]+)=$")


def written(value: Fraction) -> str:
    """Return a value as GSM8K's solutions write it: whole, or a decimal fraction of as few places as it needs."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**PLACES
    if scaled.denominator == 1:
        sign, digits = "-" * (scaled < 0), f"{abs(scaled.numerator):0{PLACES + 1}d}"
        return f"{sign}{digits[:-PLACES]}.{digits[-PLACES:]}".rstrip("0")
    return f"{float(round(value, CENTS)):.{CENTS}f}".rstrip("0").rstrip(".")


def completion(text: str) -> str | None:
    """Return what the calculator writes behind `text` that ends with an open `<<expression=`; None if it does not."""
    found = _OPEN.search(text)
    value = None if found is None else evaluate(found[1])
    return None if value is None else f"{written(value)}>>"


def generate_with_calculator(
    model: LanguageModel, alphabet: Vocabulary, prompts: Sequence[str], max_new_tokens: int, *, batch: int = 256
) -> list[str]:
    """Return the text that continues each prompt, its end symbol included if it came; results in the given order.

    Raises UserError for a prompt that is empty or longer than the model reads, and for a model that gives several
    tokens a pass.
    """
    if model.decoding.shift:
        raise UserError("calculator: this model gives several tokens a pass, between which nothing can be filled in")
    ids = [alphabet.encode(prompt) for prompt in prompts]
    room = longest_input(model)
    for prompt in ids:
        check_length(len(prompt), room)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    texts: dict[int, str] = {}
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            found = _generate([ids[row] for row in rows], model, alphabet, max_new_tokens, room)
            texts.update(zip(rows, found, strict=True))
    return [texts[row] for row in range(len(ids))]


def _generate(
    prompts: list[list[int]], model: LanguageModel, alphabet: Vocabulary, max_new_tokens: int, room: int
) -> list[str]:
    device, end_id = device_of(model), alphabet.end_id
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    budgets = np.minimum(max_new_tokens, room - lengths + 1)
    tokens_BT = np.full((len(prompts), int(lengths.max())), end_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    state = model.init_state(len(prompts), max_length=int((lengths + budgets).max()))
    steps = DecodeSteps(model, state, np.zeros(len(prompts)), "eager")
    logits_BV = steps.refill(torch.from_numpy(tokens_BT).to(device), lengths)
    made: list[list[int]] = [[] for _ in prompts]
    forced: list[deque[int]] = [deque() for _ in prompts]
    done = budgets < 1
    while not done.all():
        chosen = logits_BV.argmax(-1).tolist()
        for row, answer in enumerate(made):
            if done[row]:
                continue
            if forced[row]:
                chosen[row] = forced[row].popleft()
            answer.append(chosen[row])
            done[row] = chosen[row] == end_id or len(answer) >= budgets[row]
            if not forced[row]:
                filled = completion(alphabet.decode(answer[-LOOKED_AT:]))
                if filled is not None:
                    forced[row].extend(alphabet.encode(filled))
        if done.all():
            break
        logits_BV = steps.step(torch.tensor(chosen, device=device), torch.from_numpy(~done).to(device))
    return [alphabet.decode(answer) for answer in made]
