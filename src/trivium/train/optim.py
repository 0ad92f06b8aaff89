"""AdamW with weight-decay groups, and the clipping of gradients.

On a CPU one call clips and updates all parameters, on CUDA PyTorch's fused kernel those of a group.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from trivium.config import UserError
from trivium.ops.adamw import Parameters, adamw, facts
from trivium.ops.dispatch import choose
from trivium.train.config import TrainConfig
from trivium.train.groups import grouped
from trivium.train.schedule import learning_rate


def decays(model: nn.Module) -> set[str]:
    """Return the names of the parameters under weight decay: matrices, but not embeddings, biases or norms."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and id(weight) not in embedded and not name.endswith(".bias")  # experts' are stacked
    }


class OneCallAdamW(torch.optim.AdamW):
    """AdamW on a CPU, with PyTorch's names for its state, whose clipping and update are one call of operator adamw."""

    backend = "auto"

    def clipped_step(self, limit: float | None) -> Tensor:
        """Clip the gradients to a global norm of at most `limit` and update; return the norm before clipping."""
        rows = []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                moments = (state["exp_avg"], state["exp_avg_sq"], state["step"])
                rows.append((weight, weight.grad, *moments, group["weight_decay"]))
        group = self.param_groups[0]
        return adamw(
            Parameters(*zip(*rows, strict=True)),
            rate=group["lr"],
            betas=group["betas"],
            epsilon=group["eps"],
            limit=math.inf if limit is None else limit,
            backend=self.backend,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, without what PyTorch's tells its profiler about it."""
        for group in self.param_groups:
            for weight in group["params"]:
                if set_to_none:
                    weight.grad = None
                elif weight.grad is not None:
                    weight.grad.zero_()


def build_optimizer(model: nn.Module, config: TrainConfig, backend: str = "auto") -> torch.optim.AdamW:
    """Return AdamW over the parameters of `model` that ever train, each group with and without weight decay.

    It is PyTorch's fused one, or where `backend` of operator adamw comes to another, as "auto" does on a CPU with a
    compiler and one learning rate for all, one that calls that. A group of the optimizer has the keys "peak" and
    "begins_at" of its group in the configuration. Raises UserError for groups that do not fit the model, or that have
    rates of their own with a named backend which knows one rate alone.
    """
    decayed = decays(model)
    device = next(model.parameters()).device
    captured = device.type == "cuda"  # there the rate is a tensor, which a graph of the step reads anew
    made: dict[tuple[str | None, bool], dict[str, Any]] = {}
    for each in grouped(model, config):
        if each.group.freeze:
            continue
        decay = config.weight_decay if each.group.weight_decay is None else each.group.weight_decay
        peak = config.learning_rate if each.group.learning_rate is None else each.group.learning_rate
        new: dict[str, Any] = {
            "params": [],
            "weight_decay": decay if each.name in decayed else 0.0,
            "peak": peak,
            "begins_at": each.group.begins_at,
            "lr": torch.tensor(peak, device=device) if captured else peak,
        }
        made.setdefault((each.pattern, each.name in decayed), new)["params"].append(each.weight)
    # Those that decay come first, as they did before there were patterns.
    groups = [made[key] for key in sorted(made, key=lambda key: not key[1])]
    several = len({(group["peak"], group["begins_at"]) for group in groups}) > 1
    if several and backend not in ("auto", "torch"):
        raise UserError(f"backends.adamw: {backend!r} is not allowed with train.groups; allowed: auto, torch")
    weights = [weight for group in groups for weight in group["params"]]
    more = (("rates", "several"),) if several else ()
    chosen = choose("adamw", backend, device.type, (*facts(weights), *more))
    kind = torch.optim.AdamW if chosen == "torch" else OneCallAdamW
    betas = (config.beta1, config.beta2)
    optimizer = kind(groups, lr=config.learning_rate, betas=betas, fused=True, capturable=captured)
    if isinstance(optimizer, OneCallAdamW):
        optimizer.backend = backend
    return optimizer


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, fraction: float, shortened_at: int | None = None
) -> float:
    """Set the learning rate of every group for the step that follows `step` finished ones; return the run's own.

    Chains that were shortened at the step `shortened_at` may have a warm-up of their own from there.
    """
    again, warmup = 1.0, config.chain_removal.warmup
    if shortened_at is not None and step < shortened_at + warmup:
        again = (step - shortened_at + 1) / warmup
    for group in optimizer.param_groups:
        rate = again * learning_rate(config, step, fraction, peak=group["peak"], begins_at=group["begins_at"])
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return again * learning_rate(config, step, fraction)


@torch.no_grad()
def forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer begin anew, in the tensors that it has: a captured step reads them."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def clip_gradients(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients to a global norm of at most `limit`; return the norm before, as a tensor on the device."""
    return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit, foreach=True)


def clip_and_update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, parameters: list[nn.Parameter], limit: float | None
) -> Tensor:
    """Clip the gradients and let the optimizer take a step; return the norm before clipping."""
    if isinstance(optimizer, OneCallAdamW) and not scaler.is_enabled():
        return optimizer.clipped_step(limit)
    scaler.unscale_(optimizer)
    norm = clip_gradients(parameters, limit)
    scaler.step(optimizer)
    scaler.update()
    return norm


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as named tensors: `optimizer.<moment>.<parameter>`."""
    return {
        f"optimizer.{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; parameters without stored moments start afresh."""
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        _, moment, name = key.split(".", 2)
        parameter = model.get_parameter(name)
        optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)
