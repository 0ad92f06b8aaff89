"""Greedy and sampled decoding from the model's streaming state: each token is read once, a prefix never again.

Shapes: B rows of a batch, A rows of it still held, T tokens of the longest prompt, N tokens that may be generated,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import nn

from trivium.config import UserError
from trivium.generate.captured import DecodeSteps
from trivium.generate.sampling import Generation, device_of, sample, uniforms
from trivium.generate.shifted import generate_shifted
from trivium.model.base import LanguageModel


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 256,
    probabilities: bool = False,
) -> list[Generation]:
    """Continue each of `prompts` (token ids, any lengths), `batch` side by side; results in the given order.

    A row ends with `end_id`, after `max_new_tokens`, or when the model can read no further. Temperature 0 takes the
    most probable token; above it, a row's sample depends on (seed, its index in `prompts`) and not on the rows beside
    it. A model with a shift (`LanguageModel.decoding`) gives several tokens a pass. Raises UserError for a negative
    temperature, an empty prompt and one longer than the model reads.
    """
    if not temperature >= 0 or temperature == float("inf"):
        raise UserError(f"temperature {temperature}: expected a finite number of at least 0 (0 is greedy)")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: expected a positive whole number")
    if batch < 1:
        raise UserError(f"batch {batch}: expected a positive whole number")
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    room = longest_input(model)
    for length in (lengths.min(), lengths.max()) if len(lengths) else ():
        check_length(int(length), room, least=model.decoding.shift + 1)
    # Rows of like length side by side need no padding and end together.
    order = np.argsort(lengths, kind="stable")
    results: dict[int, Generation] = {}
    with evaluating(model), torch.inference_mode():
        reach = np.minimum(lengths + max_new_tokens - 1, room)
        steps = None
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            if model.decoding.shift:
                found = generate_shifted(
                    model,
                    [prompts[row] for row in chosen],
                    chosen,
                    end_id=end_id,
                    max_new_tokens=max_new_tokens,
                    room=room,
                    temperature=temperature,
                    seed=seed,
                )
                results.update(zip(chosen.tolist(), found, strict=True))
                continue
            if steps is None or not steps.fixed:
                # Captured steps serve every batch: their rows, and the room of each, suffice for all.
                served = order if served_at_once(device_of(model)) else chosen
                held = model.init_state(min(batch, len(served)), max_length=int(reach[served].max()))
                steps = DecodeSteps(model, held, np.zeros(min(batch, len(served))))
            found = _generate_batch(
                steps,
                [prompts[row] for row in chosen],
                chosen,
                end_id,
                np.minimum(max_new_tokens, room - lengths[chosen] + 1),
                temperature,
                seed,
                probabilities,
            )
            results.update(zip(chosen.tolist(), found, strict=True))
    return [results[row] for row in range(len(prompts))]


def served_at_once(device: torch.device) -> bool:
    """Say whether one state serves all batches of a call, as captured steps need it."""
    return device.type == "cuda"


def longest_input(model: LanguageModel) -> int:
    """Return the number of tokens that `model` can read in one sequence."""
    return getattr(model.config, "max_length", None) or model.context.max_length


def check_length(prompt: int, room: int, answer: int = 0, least: int = 1) -> None:
    """Raise UserError unless a model that reads `room` tokens can read the prompt and write the answer after it.

    Lengths are in tokens. The last token of an answer is predicted and never read. A model with a shift reads `least`
    tokens before it answers.
    """
    if prompt < 1:
        raise UserError("empty prompt: give the model at least one token to continue")
    if prompt < least:
        raise UserError(f"a prompt of {prompt} tokens: this model reads {least} or more before it answers")
    if prompt > room:
        raise UserError(f"expression too long for the model: {prompt} tokens, the model reads at most {room}")
    if answer and prompt + answer - 1 > room:
        raise UserError(
            f"expression too long for the model: {prompt} tokens and {answer} of its answer, "
            f"the model reads at most {room}"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into eval mode, and each back into its own afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _generate_batch(
    steps: DecodeSteps,
    prompts: list[Sequence[int]],
    rows: np.ndarray,
    end_id: int,
    budgets_B: np.ndarray,
    temperature: float,
    seed: int,
    probabilities: bool,
) -> list[Generation]:
    device, held = device_of(steps.model), len(steps.lengths)
    tokens_BT, lengths_B = _pad(prompts, end_id, held)
    # Rows of captured steps that no prompt fills are done from the start.
    budgets_B = np.pad(budgets_B, (0, held - len(prompts)))
    num_steps = int(budgets_B.max())
    uniform_BN = None
    if temperature > 0:
        uniform_BN = uniforms(seed, np.pad(rows, (0, held - len(rows))), num_steps).to(device)
    generated_BN = torch.full((held, num_steps), end_id, dtype=torch.int64, device=device)
    probability_BN = torch.zeros((held, num_steps), dtype=torch.float64, device=device)

    logits_AV = steps.refill(torch.from_numpy(tokens_BT).to(device), lengths_B)
    slots_A = torch.arange(held, device=device)
    budgets_A = torch.from_numpy(budgets_B).to(device)
    done_A = budgets_A < 1
    for step in range(num_steps):
        if uniform_BN is None:
            chosen_A = logits_AV.argmax(-1)
        else:
            chosen_A = sample(logits_AV, temperature, uniform_BN[slots_A, step])
        generated_BN[slots_A, step] = chosen_A
        if probabilities:
            share_AV = logits_AV.double().softmax(-1)
            probability_BN[slots_A, step] = share_AV.gather(1, chosen_A[:, None])[:, 0]
        done_A = done_A | (chosen_A == end_id) | (budgets_A <= step + 1)
        if steps.fixed:
            # Asking how many are done waits for the device, which could be at the next steps.
            if step + 1 == num_steps or (step % 8 == 7 and bool(done_A.all())):
                break
            logits_AV = steps.step(chosen_A, ~done_A)
            continue
        num_done = int(done_A.sum())
        if num_done == len(done_A):
            break
        if 2 * num_done >= len(done_A):
            kept = (~done_A).nonzero()[:, 0]
            steps.select(kept)
            slots_A, budgets_A, done_A, chosen_A = slots_A[kept], budgets_A[kept], done_A[kept], chosen_A[kept]
            num_done = 0
        logits_AV = steps.step(chosen_A, ~done_A if num_done else None)

    results = []
    shares = probability_BN.tolist() if probabilities else [None] * held
    used = zip(generated_BN.tolist(), shares, budgets_B.tolist(), strict=True)
    for tokens, share, budget in islice(used, len(prompts)):
        # What a row holds behind its end is what it was fed while it waited for the others.
        count = tokens.index(end_id) + 1 if end_id in tokens else budget
        finished = count <= budget and tokens[count - 1] == end_id
        count = min(count, budget)
        results.append(Generation(tokens[:count], share[:count] if share else None, finished))
    return results


def _pad(prompts: list[Sequence[int]], pad_id: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    lengths_B = np.zeros(rows, dtype=np.int64)
    lengths_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens_BT = np.full((rows, int(lengths_B.max())), pad_id, dtype=np.int64)
    inside_BT = np.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    tokens_BT[inside_BT] = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
    return tokens_BT, lengths_B
