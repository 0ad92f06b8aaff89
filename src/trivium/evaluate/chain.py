"""Is a chain of thought true, does the answer follow from it, and does the model use what it wrote?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trivium.evaluate.statistics import rate
from trivium.generate.engine import generate, longest_input
from trivium.model.base import LanguageModel
from trivium.tasks.answers import THINK_END
from trivium.tasks.base import Example, Task


def chain_scores(
    model: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    *,
    seed: int = 0,
    batch: int = 256,
) -> dict[str, Any] | None:
    """Judge the chains in `texts`, which `model` generated for `examples`; None where no example wants a chain.

    Returns {"problems": those that want a chain, and rates with Wilson's interval:
    "steps_true": of the steps that were written, those whose own arithmetic is true;
    "steps_wanted": of the steps of the right chains, those that were written at their place;
    "all_steps_true": of the problems, those with a chain of true steps only;
    "answer_follows": of the problems, those whose answer is the one that their own chain leads to;
    "corrupted_changes": of the problems with a chain to corrupt, those whose answer changes when one digit of one
    step is changed and the model goes on from there; it goes on greedily, and from the chain as it wrote it too, so
    that sampled texts are not blamed on the change;
    "corrupted_follows": of the same, those that then answer what the corrupted chain leads to}.
    """
    right = [task.steps(example, example.answer) for example in examples]
    chained = [index for index, chain in enumerate(right) if chain]
    if not chained:
        return None
    examples = [examples[index] for index in chained]
    texts = [texts[index] for index in chained]
    steps = [task.steps(example, text) for example, text in zip(examples, texts, strict=True)]
    written = [step.true for chain in steps for step in chain]
    as_wanted = [
        place < len(chain) and chain[place].text == step.text
        for index, chain in zip(chained, steps, strict=True)
        for place, step in enumerate(right[index])
    ]
    follows = [_follows(task, example, text) for example, text in zip(examples, texts, strict=True)]
    changed, obeyed = _corrupt(model, task, examples, texts, seed, batch)
    return {
        "problems": len(examples),
        "steps_true": rate(sum(written), len(written)),
        "steps_wanted": rate(sum(as_wanted), len(as_wanted)),
        "all_steps_true": rate(sum(bool(chain) and all(step.true for step in chain) for chain in steps), len(steps)),
        "answer_follows": rate(sum(follows), len(follows)),
        "corrupted_changes": rate(sum(changed), len(changed)),
        "corrupted_follows": rate(sum(obeyed), len(obeyed)),
    }


def _follows(task: Task, example: Example, text: str) -> bool:
    implied = task.answer_from_steps(example, text)
    return implied is not None and task.verify(example, text).answer == implied


def _corrupt(
    model: LanguageModel, task: Task, examples: Sequence[Example], texts: Sequence[str], seed: int, batch: int
) -> tuple[list[bool], list[bool]]:
    """Return (answer changed, answer is that of the corrupted chain) of each problem whose chain can be corrupted."""
    room = longest_input(model)
    chosen: list[tuple[Example, str]] = []
    prompts: list[list[int]] = []
    for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
        corrupted = task.corrupt_step(example, text, np.random.default_rng((seed, index)))
        if corrupted is None:
            continue
        chains = ["".join(version.partition(THINK_END)[:2]) for version in (text, corrupted)]
        pair = [task.alphabet.encode(example.prompt + chain) for chain in chains]
        if max(map(len, pair)) <= room:
            chosen.append((example, chains[1]))
            prompts += pair
    generations = generate(
        model, prompts, end_id=task.alphabet.end_id, max_new_tokens=task.max_length, temperature=0.0, batch=batch
    )
    answers = [task.alphabet.decode(generation.tokens) for generation in generations]
    changed = [after != before for before, after in zip(answers[0::2], answers[1::2], strict=True)]
    obeyed = [
        _follows(task, example, chain + answer) for (example, chain), answer in zip(chosen, answers[1::2], strict=True)
    ]
    return changed, obeyed
