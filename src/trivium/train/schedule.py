"""How long a run is, and the learning rate along it: pure functions of what has been done so far."""

import math
from dataclasses import dataclass

from trivium.config import UserError
from trivium.train.config import TrainConfig

DEFAULT_STEPS = 1000


@dataclass(frozen=True)
class Length:
    """The end of a run, in optimizer steps or in training tokens (all, or those to generate); one of them is set."""

    steps: int | None
    tokens: int | None = None

    def fraction(self, step: int, tokens: int) -> float:
        """Return the part of the run, 0 to 1, that `step` finished steps over `tokens` tokens make."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.tokens is not None
        return min(1.0, tokens / self.tokens)

    def expected_steps(self, step: int, tokens: int, tokens_per_step: float) -> int:
        """Return the steps of the whole run; an estimate when its length is given in tokens."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        rate = tokens / step if step else tokens_per_step
        return step if tokens >= self.tokens else max(step + 1, math.ceil(self.tokens / max(rate, 1.0)))


def run_length(config: TrainConfig, batch: int, examples_in_epoch: int | None) -> Length:
    """Return where the run ends; raise UserError for epochs of a task whose problems never run out."""
    if config.epochs is not None:
        if examples_in_epoch is None:
            raise UserError(
                "train.epochs: this task's problems never run out; give train.steps or train.tokens instead"
            )
        return Length(steps=max(1, math.ceil(config.epochs * examples_in_epoch / batch)))
    if config.tokens is not None or config.generated_tokens is not None:
        return Length(steps=None, tokens=config.tokens or config.generated_tokens)
    return Length(steps=config.steps or DEFAULT_STEPS)


def learning_rate(
    config: TrainConfig, step: int, fraction: float, *, peak: float | None = None, begins_at: int = 0
) -> float:
    """Return the learning rate of the step that follows `step` finished ones, `fraction` of the run being done.

    Linear warm-up reaches the peak in the step numbered `warmup`; the decay starts there and ends with the run. A group
    of parameters has a `peak` of its own (null: the run's), and one that trains from the step after `begins_at` on is
    warmed up there, to what the decay has left.
    """
    peak = config.learning_rate if peak is None else peak
    if begins_at > 0 and step < begins_at + config.warmup:
        full = learning_rate(config, step, fraction, peak=peak)
        return min(full, full * max(0, step - begins_at + 1) / config.warmup)
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.schedule == "constant":
        return peak
    # Measured in the unit of the run's length, steps or tokens, so that warm-up in steps ends where decay begins.
    warmup = fraction * config.warmup / step if step else 0.0
    decayed = (fraction - warmup) / (1 - warmup) if warmup < 1 else 1.0
    kept = 1 - decayed if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * decayed))
    return config.min_learning_rate + (peak - config.min_learning_rate) * kept
