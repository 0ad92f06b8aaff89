"""Answers by the ordinary streaming call: what prompts have in common is read once, and rows that have ended are
dropped once they are half of those held.

Shapes: B rows, A rows still held, T tokens of the longest prompt, R tokens of a pass, N tokens of an answer, V symbols.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.generate.answers import Found, Prompts, Wanted, choose, room_needed, shares_of, uniforms_of
from trivium.generate.sampling import device_of
from trivium.model.base import LanguageModel

# What reading a prompt in pieces costs, in tokens read: another pass, and for each row the copying of its state.
STOP, COPY = 16, 0.5


class EagerAnswers:
    """Answers by the ordinary streaming call, with as many rows as are left."""

    def __init__(self, model: LanguageModel, wanted: Wanted):
        self.model, self.wanted = model, wanted

    def __call__(self, prompts: Prompts) -> Found:
        """Return what every row gets; behind its end stands what the row was fed while it waited."""
        model, wanted, device = self.model, self.wanted, device_of(self.model)
        rows, per_pass = len(prompts.lengths_B), model.decoding.shift + 1
        num_passes = -(-int(prompts.budgets_B.max()) // per_pass)
        uniform_BN = uniforms_of(wanted, prompts.rows_B, num_passes * per_pass, device)
        tokens_BN = torch.full((rows, num_passes * per_pass), wanted.end_id, dtype=torch.int64, device=device)
        shares_BN = torch.zeros(tokens_BN.shape, dtype=torch.float64, device=device) if wanted.probabilities else None
        slots_A, budgets_A = torch.arange(rows, device=device), torch.from_numpy(prompts.budgets_B).to(device)
        lengths_B = torch.from_numpy(prompts.lengths_B).to(device) if prompts.ragged else None
        room = room_needed(prompts.lengths_B, prompts.budgets_B, per_pass)
        logits_ARV, state = _read_shared(model, prompts, lengths_B, room, device)
        done_A = budgets_A < 1
        for start in range(0, num_passes * per_pass, per_pass):
            columns = slice(start, start + per_pass)
            uniform_AR = None if uniform_BN is None else uniform_BN[slots_A, columns]
            chosen_AR = choose(logits_ARV, wanted, uniform_AR)
            tokens_BN[slots_A, columns] = chosen_AR
            if shares_BN is not None:
                shares_BN[slots_A, columns] = shares_of(logits_ARV, chosen_AR)
            done_A = done_A | (chosen_AR == wanted.end_id).any(1) | (budgets_A <= columns.stop)
            num_done = int(done_A.sum())
            if num_done == len(done_A):
                break
            if 2 * num_done >= len(done_A):
                kept = (~done_A).nonzero()[:, 0]
                state = state.select(kept)
                slots_A, budgets_A, done_A, chosen_AR = slots_A[kept], budgets_A[kept], done_A[kept], chosen_AR[kept]
                num_done = 0
            added_A = (~done_A).long() * per_pass if num_done else None
            logits_ARV, state = model(chosen_AR, state, lengths_B=added_A)
        return Found(tokens_BN, shares_BN)


def _read_shared(
    model: LanguageModel, prompts: Prompts, lengths_B: Tensor | None, room: int, device: torch.device
) -> tuple[Tensor, Any]:
    """Return (logits_BRV, state) behind the prompts, whose common beginnings are read once and copied."""
    tokens_BT, per_pass = prompts.tokens_BT.to(device), model.decoding.shift + 1
    state, held_B, begin = None, None, 0
    for end in shared_cuts(prompts, per_pass):
        # The rows of the state are the distinct beginnings of `begin` tokens, `held_B` says which is whose.
        _, first_U, index_B = np.unique(
            prompts.tokens_BT[:, :end].cpu().numpy(), axis=0, return_index=True, return_inverse=True
        )
        state = _continued(model, state, held_B, torch.from_numpy(first_U).to(device), room)
        _, state = model(tokens_BT[first_U, begin:end], state)
        held_B, begin = torch.from_numpy(index_B.reshape(-1)).to(device), end
    state = _continued(model, state, held_B, torch.arange(len(tokens_BT), device=device), room)
    return model.last(tokens_BT[:, begin:], state, None if lengths_B is None else lengths_B - begin, per_pass)


def _continued(model: LanguageModel, state: Any, held_B: Tensor | None, rows_U: Tensor, room: int) -> Any:
    if state is None or held_B is None:
        return model.init_state(len(rows_U), max_length=room)
    return state.select(held_B[rows_U])


def shared_cuts(prompts: Prompts, per_pass: int) -> list[int]:
    """Return after how many tokens the reading of prompts is to stop and their distinct beginnings be counted again.

    Chosen are those places that leave the least to be done. The last R tokens of every row are read at once.
    """
    latest = int(prompts.lengths_B.min()) - per_pass
    if len(prompts.lengths_B) < 2 or latest < 1:
        return []
    tokens_BT = prompts.tokens_BT.cpu().numpy()
    distinct = [len(np.unique(tokens_BT[:, :end], axis=0)) for end in range(1, latest + 1)]
    # cheapest[end]: (tokens read for the first `end` places, the stops before it)
    cheapest: list[tuple[float, list[int]]] = [(0, [])]
    for end, rows in enumerate(distinct, 1):
        cheapest.append(
            min(
                (cost + (end - begin) * rows + (COPY * rows if begin else 0) + STOP, [*stops, end])
                for begin, (cost, stops) in enumerate(cheapest)
            )
        )
    rest = [
        cost + len(tokens_BT) * (tokens_BT.shape[1] - begin + (COPY if begin else 0))
        for begin, (cost, _) in enumerate(cheapest)
    ]
    return cheapest[int(np.argmin(rest))][1]
