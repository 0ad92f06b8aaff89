"""Short problems first: which stage a run is in, and when it goes on to the next."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from trivium.config import UserError
from trivium.tasks.base import Task
from trivium.tasks.counter_random import key, mix, unit
from trivium.train.config import ChainRemovalConfig, CurriculumConfig
from trivium.train.state import Position

_SMOOTHED = key(2405, 14838)  # apart from the words that problems are drawn with
_log = logging.getLogger("trivium")


class Curriculum:
    """The stages of a run. Everything that changes is in the run's `Position`, so that a resumed run goes on alike."""

    def __init__(
        self, config: CurriculumConfig, task: Task, eval_examples: int, removal: ChainRemovalConfig | None = None
    ):
        self.config = config
        self.removal = removal or ChainRemovalConfig()
        self.task = task
        self.eval_examples = eval_examples
        self._indices: dict[int, np.ndarray] = {}
        for length in config.lengths:
            try:
                task.staged(length)
                self.indices(length)  # a stage without validation problems is refused before training
            except UserError as error:
                raise UserError(f"train.curriculum.lengths: {length}: {error}") from None

    @property
    def first(self) -> int:
        """The stage that a run begins in: 0, the whole task, when there are no others."""
        return self.config.lengths[0] if self.config.lengths else 0

    def indices(self, stage: int) -> np.ndarray:
        """Return the validation problems of `stage`."""
        if stage not in self._indices:
            self._indices[stage] = self.task.distinct("validation", self.eval_examples, stage)
        return self._indices[stage]

    def advance(self, at: Position, score: Callable[[np.ndarray, int], dict[str, Any]]) -> dict[str, Any] | None:
        """Score the stage that `at` is in with `score(indices, stage)`, and move `at` on if its criterion holds.

        A stage that has had `most_evaluations` is left in any case. Returns the row of metrics, with "advanced" and
        "held" (the criterion) in it; None when the whole task is learned already. Warns once when a stage has lasted
        for `warn_after` evaluations.
        """
        if at.stage == 0:
            return None
        config, stage = self.config, at.stage
        scores = score(self.indices(stage), stage)
        value = scores[config.metric]
        held = value <= config.advance_at if config.metric == "loss" else value >= config.advance_at
        following = [length for length in config.lengths if length > stage]
        at.stage_evaluations += 1
        advanced = held or at.stage_evaluations == config.most_evaluations
        if at.stage_evaluations == config.warn_after and not held:
            _log.warning(
                "step %d: the curriculum has not gone on from length %d in %d evaluations: %s is %.4g, to go on to %s "
                "it has to be %s %g",
                at.step,
                stage,
                at.stage_evaluations,
                config.metric,
                value,
                f"length {following[0]}" if following else "the whole task",
                "at most" if config.metric == "loss" else "at least",
                config.advance_at,
            )
        if advanced:
            at.stage, at.stage_evaluations = (following[0] if following else 0), 0
        return {"split": "stage", "stage": stage, **scores, "advanced": advanced, "held": held}

    def shorten_chains(self, at: Position) -> bool:
        """Take more from each chain of thought if the whole task is reached and its last scores are good enough, or
        have been looked at often enough; say whether more was taken.
        """
        if not self.removal.shortens or at.stage or at.chain_removed >= self.task.max_length or at.validation is None:
            return False
        following = self.removal.following(at.chain_removed)
        if following is None:
            return False
        at.stage_evaluations += 1
        good = at.validation["exact_match"] >= self.removal.advance_at
        if not good and at.stage_evaluations != self.removal.most_evaluations:
            return False
        at.chain_removed, at.stage_evaluations, at.shortened_at = following, 0, at.step
        return True

    def more_removed(self, indices_B: np.ndarray) -> np.ndarray:
        """Return how many more tokens the chain of each training problem lacks than the stage says."""
        share_B = unit(mix(indices_B.astype(np.uint64) + _SMOOTHED))
        return np.floor(-np.log1p(-share_B) / self.removal.smoothing).astype(np.int64)
