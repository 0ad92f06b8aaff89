"""What tasks whose problems stand in JSONL files are configured by."""

from dataclasses import dataclass
from pathlib import Path

from trivium.registry import UserError
from trivium.tasks.base import TaskConfig

END = "<end>"


@dataclass(frozen=True)
class ProblemFilesConfig(TaskConfig):
    """Files of problems with solutions, what of them is held out, and how their text becomes tokens."""

    train: Path
    """JSONL file of training problems."""
    test: Path | None = None
    """JSONL file of test problems."""
    held_out: int = 500
    """Problems at the end of the training file that are for validation instead."""
    tokenizer: str | None = None
    """Vocabulary: a folder with a tokenizer's files, or a hub id such as gpt2; null: the characters of the files."""
    alphabet: tuple[str, ...] | None = None
    """Without a tokenizer, symbols of the vocabulary in order of their ids (default: the characters of the files)."""
    longest: int | None = None
    """Leave out training problems of more tokens than this; validation and test keep all of theirs."""
    max_length: int | None = None
    """Tokens of the longest problem (default: that of the files)."""

    def __post_init__(self):
        if self.held_out < 1:
            raise UserError(f"held_out: expected 1 or more problems, got {self.held_out}")
        for name in ("longest", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"{name}: expected 2 or more tokens, got {value}")
        if self.alphabet is not None and (self.tokenizer is not None or END not in self.alphabet):
            raise UserError(f"alphabet: expected symbols, one of them {END}, and no tokenizer beside it")
