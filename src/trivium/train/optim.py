"""AdamW with weight-decay groups, and the clipping of gradients.

On a CPU one call clips and updates all parameters, on CUDA PyTorch's fused kernel those of a group.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trivium.ops.adamw import Parameters, adamw, facts
from trivium.ops.dispatch import choose
from trivium.train.config import TrainConfig


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of everything trained, a tied one once, in the order of the model."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def decays(model: nn.Module) -> set[str]:
    """Return the names of the parameters under weight decay: matrices, but not embeddings, biases or norms."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, weight in named_parameters(model) if weight.ndim >= 2 and id(weight) not in embedded}


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
    """Return AdamW over two groups of `model`'s parameters, with and without weight decay: PyTorch's fused one, or
    where `backend` of operator adamw comes to another, as "auto" does on a CPU with a compiler, one that calls that.
    """
    decayed = decays(model)
    groups = [
        {"params": [p for name, p in named_parameters(model) if name in decayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named_parameters(model) if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    device = next(model.parameters()).device
    captured = device.type == "cuda"  # there the rate is a tensor, which a graph of the step reads anew
    rate = torch.tensor(config.learning_rate, device=device) if captured else config.learning_rate
    weights = [weight for group in groups for weight in group["params"]]
    chosen = choose("adamw", backend, device.type, facts(weights))
    kind = torch.optim.AdamW if chosen == "torch" else OneCallAdamW
    optimizer = kind(groups, lr=rate, betas=(config.beta1, config.beta2), fused=True, capturable=captured)
    if isinstance(optimizer, OneCallAdamW):
        optimizer.backend = backend
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group for the next step."""
    first = optimizer.param_groups[0]["lr"]
    if isinstance(first, Tensor):  # one for all groups
        first.fill_(rate)
        return
    for group in optimizer.param_groups:
        group["lr"] = rate


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
        for name, parameter in named_parameters(model)
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
