"""The end of a pass of greedy decoding: choose each row's symbol, keep it, and say which rows have ended.

Shapes: B rows, V symbols, N tokens of an answer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.ops import dispatch
from trivium.ops.simplicial import triton_support

MOST = 1024  # symbols that one kernel chooses from


def take_greedy(
    logits_BV: Tensor,
    tokens_BN: Tensor,
    place_B: Tensor,
    budgets_B: Tensor,
    done_B: Tensor,
    fed_B: Tensor,
    added_B: Tensor,
    end_id: int,
    *,
    backend: str = "auto",
) -> None:
    """Write each row's most probable symbol into `fed_B` and, in rows that have not ended, at its place in `tokens_BN`,
    and move the place on by 1.

    Rows end (`done_B`, bool) with `end_id` or where their place reaches their budget; `added_B` is 1 in rows that have
    not ended, 0 in others. All but `done_B` and the logits are int64. The backends are "torch", "reference" and
    "triton", of at most MOST symbols. Raises UserError for a backend that is missing or cannot.
    """
    facts = (("many", "yes" if logits_BV.shape[1] > MOST else "no"),)
    function = dispatch.load("take_greedy", backend, logits_BV.device.type, facts)
    function(logits_BV, tokens_BN, place_B, budgets_B, done_B, fed_B, added_B, end_id)


def _parts(
    logits_BV: Tensor,
    tokens_BN: Tensor,
    place_B: Tensor,
    budgets_B: Tensor,
    done_B: Tensor,
    fed_B: Tensor,
    added_B: Tensor,
    end_id: int,
) -> None:
    chosen_B = logits_BV.argmax(-1)
    at_B1 = place_B.clamp_max(tokens_BN.shape[1] - 1)[:, None]
    tokens_BN.scatter_(1, at_B1, torch.where(done_B[:, None], tokens_BN.gather(1, at_B1), chosen_B[:, None]))
    place_B += ~done_B
    done_B |= chosen_B == end_id
    done_B |= budgets_B <= place_B
    fed_B.copy_(chosen_B)
    added_B.copy_(~done_B)


def _refuses(facts: Mapping[str, Any]) -> str | None:
    return f"more than {MOST} symbols" if facts.get("many", "no") == "yes" else None


def _load_triton() -> Callable[..., None]:
    from trivium.ops.take_greedy.kernels import by_triton

    return by_triton


dispatch.register("take_greedy", "reference", dispatch.Backend(lambda: _parts))
dispatch.register(
    "take_greedy",
    "torch",
    dispatch.Backend(lambda: _parts, suits=lambda device_type: "PyTorch's own, one by one"),
)
dispatch.register(
    "take_greedy",
    "triton",
    dispatch.Backend(_load_triton, missing=triton_support.missing, suits=triton_support.suits, refuses=_refuses),
)
