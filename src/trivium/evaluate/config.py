"""The knobs of a final evaluation."""

from dataclasses import dataclass

from trivium.config import UserError


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

    def __post_init__(self):
        for name in ("examples", "batch", "samples"):
            if getattr(self, name) < (0 if name == "samples" else 1):
                raise UserError(f"{name}: expected a positive whole number, got {getattr(self, name)}")
        if min(self.lengths, default=1) < 1 or len(set(self.lengths)) != len(self.lengths):
            raise UserError(f"lengths: expected different lengths of 1 or more, got {list(self.lengths)}")
