"""Decoding several tokens a pass, from a model whose logits at place t are those of token t + 1 + shift.

With a prompt of P tokens the first answer token is read at place P - 1 - shift, while the prompt is still being read;
each pass then reads the shift + 1 tokens that the one before gave. Shapes: B rows, T tokens of the longest prompt, R =
shift + 1 tokens of a pass, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from trivium.generate.sampling import Generation, device_of, sample, uniforms
from trivium.model.base import LanguageModel


def generate_shifted(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    rows: np.ndarray,
    *,
    end_id: int,
    max_new_tokens: int,
    room: int,
    temperature: float,
    seed: int,
) -> list[Generation]:
    """Continue `prompts`, which are the `rows` of a call to `generate`, side by side; see there for the rest.

    Where one pass gives the whole answer (`decoding.answer_tokens`), the end token is added to it, not generated.
    """
    device, shift, whole = device_of(model), model.decoding.shift, model.decoding.answer_tokens
    per_pass = shift + 1
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    tokens_BT = np.full((len(prompts), int(lengths.max())), end_id, dtype=np.int64)
    tokens_BT[np.arange(tokens_BT.shape[1]) < lengths[:, None]] = np.concatenate(prompts)
    # A pass fits when all that it reads does; what it gives may lie beyond.
    passes_B = 1 if whole else np.minimum(-(-max_new_tokens // per_pass), 1 + (room - lengths) // per_pass)
    budgets_B = torch.from_numpy(np.minimum(max_new_tokens, np.broadcast_to(passes_B * per_pass, lengths.shape))).to(
        device
    )
    num_passes = int(np.max(passes_B))
    uniform_BN = uniforms(seed, rows, num_passes * per_pass).to(device) if temperature > 0 else None

    lengths_B = torch.from_numpy(lengths).to(device)
    place_R = torch.arange(per_pass, device=device)
    row_B1 = torch.arange(len(prompts), device=device)[:, None]
    state = model.init_state(len(prompts), max_length=int(lengths.max()) + (num_passes - 1) * per_pass)
    logits_BTV, state = model(torch.from_numpy(tokens_BT).to(device), state, lengths_B=lengths_B)
    logits_BRV = logits_BTV[row_B1, lengths_B[:, None] - per_pass + place_R]
    chosen, shares = [], []
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for index in range(num_passes):
        if uniform_BN is None:
            chosen_BR = logits_BRV.argmax(-1)
        else:
            columns = slice(index * per_pass, (index + 1) * per_pass)
            chosen_BR = sample(logits_BRV.flatten(0, 1), temperature, uniform_BN[:, columns].flatten())
            chosen_BR = chosen_BR.view(len(prompts), per_pass)
        chosen.append(chosen_BR)
        shares.append(logits_BRV.double().softmax(-1).gather(2, chosen_BR[..., None])[..., 0])
        done_B = done_B | (chosen_BR == end_id).any(1) | (budgets_B <= (index + 1) * per_pass)
        if index + 1 == num_passes or bool(done_B.all()):
            break
        logits_BRV, state = model(chosen_BR, state, lengths_B=torch.where(done_B, 0, per_pass))

    results = []
    columns = zip(torch.cat(chosen, 1).tolist(), torch.cat(shares, 1).tolist(), budgets_B.tolist(), strict=True)
    for tokens, share, budget in columns:
        if whole:
            count = min(whole, max_new_tokens)
            complete = whole < max_new_tokens
            ending = ([end_id], [1.0]) if complete else ([], [])
            results.append(Generation(tokens[:count] + ending[0], share[:count] + ending[1], complete))
            continue
        count = min(tokens.index(end_id) + 1 if end_id in tokens else len(tokens), budget)
        results.append(Generation(tokens[:count], share[:count], tokens[count - 1] == end_id))
    return results
