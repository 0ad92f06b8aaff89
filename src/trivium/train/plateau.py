"""When validation stops improving, one source of the training mixture gets a larger share, within bounds."""

import math
from typing import Any

from trivium.config import UserError
from trivium.registry import nearest
from trivium.tasks.base import Task
from trivium.tasks.mixture import Mixture
from trivium.train.config import PlateauConfig
from trivium.train.state import Position


class Plateau:
    """Watches the validation scores of a run. All that changes is in its `Position`, so that it resumes alike."""

    def __init__(self, config: PlateauConfig, task: Task, batch_examples: int):
        self.config, self.task, self.batch_examples = config, task, batch_examples
        if config.source is None:
            return
        if not isinstance(task, Mixture):
            raise UserError("train.plateau.source: the task is no mixture, so that no source of it can be raised")
        if config.source not in task.names:
            allowed = nearest(config.source, task.names)
            raise UserError(f"train.plateau.source: the mixture has no {config.source!r}; {allowed}")
        if len(task.names) == 1:
            raise UserError("train.plateau.source: the mixture has this source alone; it cannot get a larger share")
        share = _shares(dict(zip(task.names, task.segments[0][1], strict=True)))[config.source]
        if share >= config.largest:
            raise UserError(
                f"train.plateau.largest: {config.largest} is no more than the share of {share:g} that {config.source} "
                "begins with; give a larger one"
            )

    def mixed(self, at: Position) -> Task:
        """Return the task whose training problems have the weights that `at` holds."""
        if not at.mixture:
            return self.task
        assert isinstance(self.task, Mixture)
        return self.task.reweighted([(start, weights) for start, weights in at.mixture])

    def watch(self, at: Position) -> dict[str, Any] | None:
        """Look at the newest validation scores in `at`; on a plateau raise the share from the next step on.

        Returns the row of metrics with every source's new share, or None if nothing changed.
        """
        config = self.config
        if config.source is None or at.validation is None:
            return None
        value = at.validation[config.metric]
        value = -value if config.metric == "loss" else value
        if at.plateau_best is None or value > at.plateau_best + config.min_improvement:
            at.plateau_best, at.plateau_stale = value, 0
            return None
        at.plateau_stale += 1
        if at.plateau_stale < config.patience:
            return None
        at.plateau_stale = 0
        assert isinstance(self.task, Mixture)
        began = dict(zip(self.task.names, self.task.segments[0][1], strict=True))
        segments = at.mixture or [[0, began]]
        shares = _shares(segments[-1][1])
        before = shares[config.source]
        share = min(before + config.raise_by, config.largest)
        if math.isclose(share, before):
            return None  # the bound is reached
        others = {name: old * (1 - share) / (1 - before) for name, old in shares.items() if name != config.source}
        raised = {name: share if name == config.source else others[name] for name in shares}
        start = at.step * self.batch_examples
        at.mixture = [*(segment for segment in segments if segment[0] < start), [start, raised]]
        return {"split": "mixture", **{f"share.{name}": value for name, value in raised.items()}}


def _shares(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
