"""The knobs of a final evaluation."""

from dataclasses import dataclass
from typing import Literal

from trivium.config import UserError, knob


@dataclass(frozen=True)
class EvaluateConfig:
    """How a trained model is scored on problems it never saw."""

    examples: int = 1000
    """Distinct test problems to generate answers for."""
    batch: int = 256
    """Rows generated side by side."""
    samples: int = 20
    """Right and wrong answers to keep in samples.jsonl, at most this many of each."""
    lengths: tuple[int, ...] = ()
    """Lengths, also beyond those of training, at which the model is scored apart; it is built to read the longest."""
    pairs: tuple[int, ...] = ()
    """Lengths of either of a problem's two numbers: the model is scored at each pair of them, as a map."""
    pair_examples: int = 100
    """Distinct test problems of each such pair."""
    published: tuple[str, ...] = ()
    """Published test sets of the task, by name, to score the model on as well."""
    precision: Literal["float32", "training"] = knob("float32", affects_results="unless_default")
    """Arithmetic of the test: float32, or that of training, which is faster where that is bfloat16."""
    keep_answers: bool = knob(False, affects_results=False)
    """Keep every test answer as answers.jsonl in the run's folder, for `trivium eval --against` and paired tests."""

    def __post_init__(self):
        for name in ("examples", "batch", "samples", "pair_examples"):
            if getattr(self, name) < (0 if name == "samples" else 1):
                raise UserError(f"{name}: expected a positive whole number, got {getattr(self, name)}")
        for name in ("lengths", "pairs"):
            lengths = getattr(self, name)
            if min(lengths, default=1) < 1 or len(set(lengths)) != len(lengths):
                raise UserError(f"{name}: expected different lengths of 1 or more, got {list(lengths)}")

    @property
    def longest(self) -> tuple[int, ...]:
        """The lengths that a model must be built to read, beside those of its task."""
        return (*self.lengths, *((max(self.pairs),) if self.pairs else ()))
