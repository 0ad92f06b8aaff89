"""Match the sizes of models: width and heads stay, the feed-forward width is solved in steps of one."""

import dataclasses
from typing import TypeVar

import torch

from trivium.model.base import ModelConfig, ModelContext
from trivium.registry import UserError

TOLERANCE = 0.01

C = TypeVar("C", bound=ModelConfig)


def match(
    config: C,
    context: ModelContext,
    *,
    parameters: int | None = None,
    flops: float | None = None,
    length: int,
) -> C:
    """Return `config` with the feed-forward width that brings it nearest to `parameters` or to `flops` per token.

    Give exactly one of the two; FLOPs are those of the forward pass at `length` tokens. Raises UserError that says
    what can be reached when the nearest is more than 1 % away.
    """
    if (parameters is None) == (flops is None):
        raise ValueError("give exactly one of parameters and flops")
    if "ff_width" not in {item.name for item in dataclasses.fields(config)}:
        raise UserError(f"ff_width: a {config.kind} model has no such field to solve, so it cannot be matched in size")
    target = parameters if parameters is not None else flops
    assert target is not None
    unit = "parameters" if parameters is not None else "FLOPs per token"

    def size(ff_width: int) -> float:
        candidate = dataclasses.replace(config, ff_width=ff_width)
        if parameters is not None:
            return candidate.num_params(context)
        return candidate.flops_per_token(context, length)

    # Both sizes are straight lines in ff_width.
    smallest = size(1)
    nearest = max(1, round(1 + (target - smallest) / (size(2) - smallest)))
    reached = size(nearest)
    if abs(reached - target) > TOLERANCE * target:
        where = "even with ff_width 1" if nearest == 1 else f"with ff_width {nearest}"
        raise UserError(
            f"ff_width: cannot match {target:,.0f} {unit} within 1 %; the nearest that this model reaches is "
            f"{reached:,.0f}, {where}"
        )
    return dataclasses.replace(config, ff_width=nearest)


def describe(config: ModelConfig, context: ModelContext, length: int) -> dict[str, int | float]:
    """Return parameters, forward FLOPs per token, and bytes of one row's streaming state in float32, at `length`."""
    return {
        "parameters": config.num_params(context),
        "flops_per_token": config.flops_per_token(context, length),
        "state_bytes": config.state_bytes(context, length, torch.float32),
    }
