"""A user's own problems, one JSON object a line: `{"prompt": "99+21=", "answer": "120", "tags": {"digits": 2}}`."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trivium.config import UserError, unreadable
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.answers import chain_regions, judge
from trivium.tasks.base import SPLITS, TASKS, Batch, Example, Split, Task, TaskConfig, Verdict
from trivium.tasks.byte_pairs import load_byte_pairs

END = "<end>"
SHAPE = 'expected {"prompt": text, "answer": text, "tags": {name: whole number or text}}, tags left out or not'
_SYMBOLS = re.compile(r"</?[A-Za-z_]\w*>|.", flags=re.DOTALL)


def _parse_row(line: str, where: str) -> Example:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {SHAPE}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object; {SHAPE}")
    unknown = [key for key in row if key not in ("prompt", "answer", "tags")]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; {SHAPE}")
    for key in ("prompt", "answer"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where}: {key} is {'missing' if key not in row else 'not text'}; {SHAPE}")
        if not row[key]:
            raise UserError(f"{where}: {key} is empty; {SHAPE}")
        if any("\ud800" <= character <= "\udfff" for character in row[key]):
            raise UserError(f"{where}: {key} holds half a surrogate pair, which no file can hold")
    tags = row.get("tags", {})
    if not isinstance(tags, dict) or any(
        isinstance(value, bool) or not isinstance(value, int | str) for value in tags.values()
    ):
        raise UserError(f"{where}: tags are not whole numbers or text; {SHAPE}")
    return Example(row["prompt"], row["answer"], tags)


def numbered_rows(path: Path) -> Iterator[tuple[int, Example]]:
    """Yield (line number, problem) of a JSONL file as it stands; the errors are those of `read_rows`."""
    try:
        with path.open(encoding="utf-8-sig") as lines:  # some editors put a byte order mark first
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse_row(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None


def ended(example: Example, end: str, where: str) -> Example:
    """Return `example` with `end` after its answer; UserError when an earlier `end` would cut the answer short."""
    body = example.answer.removesuffix(end)
    if end in body:
        raise UserError(f"{where}: the answer goes on behind {end}, which ends it")
    return dataclasses.replace(example, answer=body + end)


def read_rows(path: str | Path) -> list[Example]:
    """Return the problems of a JSONL file as they stand; blank lines are skipped.

    Raises UserError with file and line when a line is not of the shape, and when the file has no problems.
    """
    rows = [row for _, row in numbered_rows(Path(path))]
    if not rows:
        raise UserError(f"{path}: holds no problems; {SHAPE}")
    return rows


@TASKS.register("jsonl")
@dataclass(frozen=True)
class JsonlConfig(TaskConfig):
    """Problems read from JSONL files; an answer is right when it is equal to the given one."""

    train: Path
    """JSONL file of training problems."""
    validation: Path | None = None
    """JSONL file of validation problems."""
    test: Path | None = None
    """JSONL file of test problems."""
    digits: str = "0123456789"
    """Characters that count as digits for positions; those that the files lack are left out."""
    alphabet: tuple[str, ...] | None = None
    """Symbols of the vocabulary in order of their ids (default: the characters and <names> of the files)."""
    tokenizer: str | None = None
    """Byte-pair vocabulary instead: a folder with a tokenizer's files, or a hub repository such as gpt2."""
    max_length: int | None = None
    """Tokens of the longest problem (default: that of the files)."""

    def __post_init__(self):
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length: expected 2 or more tokens, got {self.max_length}")
        if self.alphabet is not None and (END not in self.alphabet or "" in self.alphabet):
            raise UserError(f"alphabet: expected symbols, one of them {END}, got {list(self.alphabet)}")
        if self.alphabet is not None and len(set(self.alphabet)) != len(self.alphabet):
            raise UserError(f"alphabet: a symbol stands twice in {list(self.alphabet)}")
        if self.alphabet is not None and self.tokenizer is not None:
            raise UserError("tokenizer: has a vocabulary of its own; give it or alphabet, not both")

    def build(self) -> "Jsonl":
        return Jsonl(self)

    def resolved(self) -> "JsonlConfig":
        return self.build().config

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["JsonlConfig"]:
        if folder is None:
            return []
        paths = {}
        for first, split in enumerate(SPLITS):
            rows = [
                {
                    "prompt": f"{number} is ",
                    "answer": f"<think>{number:b}</think>{'odd' if number % 2 else 'even'}",
                    "tags": {"digits": len(str(number))},
                }
                for number in range(first, 90, 3)
            ]
            paths[split] = folder / f"{split}.jsonl"
            paths[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return [cls(**paths)]


class Jsonl(Task):
    """Problems of files. `config` is the resolved one, whose alphabet and length no longer need the files."""

    config: JsonlConfig

    def __init__(self, config: JsonlConfig):
        self._paths: dict[Split, Path | None] = {
            "train": config.train,
            "validation": config.validation,
            "test": config.test,
        }
        pairs = None if config.tokenizer is None else load_byte_pairs(config.tokenizer)
        self._end = END if pairs is None else pairs.end
        # With the alphabet and the length at hand the files may be elsewhere, as when a trained model is loaded.
        symbols = None if pairs is not None else config.alphabet or self._symbols(config.digits)
        digits = tuple(digit for digit in dict.fromkeys(config.digits) if digit in (symbols or ()))
        self.alphabet = pairs or Alphabet(symbols or (), digits)
        self.max_length = config.max_length or self._longest[0]
        self.config = dataclasses.replace(config, alphabet=symbols, max_length=self.max_length)

    @cached_property
    def _numbered(self) -> dict[Split, list[tuple[str, Example]]]:
        """File and line, and problem, of each row of each split that has a file; answers ended."""
        numbered: dict[Split, list[tuple[str, Example]]] = {}
        seen: dict[str, str] = {}
        for split in SPLITS:
            path = self._paths[split]
            if path is None:
                continue
            here: dict[str, str] = {}
            numbered[split] = []
            for number, row in numbered_rows(path):
                where = f"{path}:{number}"
                if row.prompt in seen:
                    raise UserError(f"{where}: prompt {row.prompt!r} stands also at {seen[row.prompt]}")
                here.setdefault(row.prompt, where)
                numbered[split].append((where, ended(row, self._end, where)))
            if not numbered[split]:
                raise UserError(f"{path}: holds no problems; {SHAPE}")
            seen |= here
        return numbered

    @cached_property
    def _rows(self) -> dict[Split, list[Example]]:
        return {split: [row for _, row in numbered] for split, numbered in self._numbered.items()}

    def _symbols(self, digits: str) -> tuple[str, ...]:
        texts = (text for rows in self._rows.values() for row in rows for text in (row.prompt, row.answer))
        found = {symbol for text in texts for symbol in _SYMBOLS.findall(text)}
        first = [digit for digit in dict.fromkeys(digits) if digit in found]
        return (*first, *sorted(found - set(first) - {END}, key=lambda symbol: (len(symbol), symbol)), END)

    @cached_property
    def _longest(self) -> tuple[int, str]:
        """Tokens of the longest problem of the files, and where it stands."""
        longest = 0, ""
        for numbered in self._numbered.values():
            for where, row in numbered:
                try:
                    length = len(self.encode(row)[0]) + 1
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
                longest = max(longest, (length, where), key=lambda found: found[0])
        return longest

    def _split(self, split: Split) -> list[Example]:
        if self._paths[split] is None:
            raise UserError(f"the task has no {split} problems; give their file as task.{split}")
        return self._rows[split]

    @cached_property
    def _collated(self) -> dict[Split, Batch]:
        length, where = self._longest
        if length > self.max_length:
            raise UserError(f"max_length: {self.max_length} is given, {where} has a problem of {length} tokens")
        return {split: self.collate(rows) for split, rows in self._rows.items()}

    def size(self, split: Split) -> int | None:
        return len(self._split(split))

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        rows = self._split(split)
        if not 0 <= index < len(rows):
            raise IndexError(f"the {split} split has {len(rows)} problems, there is no number {index}")
        return rows[index]

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        self._split(split)
        whole, rows = self._collated[split], np.asarray(indices, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(whole)):
            raise IndexError(f"the {split} split has {len(whole)} problems, numbers {rows.min()} to {rows.max()} asked")
        return whole.take(rows)

    def canonical(self, example: Example) -> str:
        return example.prompt

    def regions(self, example: Example) -> list[int]:
        return chain_regions(self.alphabet, example)

    def verify(self, example: Example, text: str) -> Verdict:
        """Decide whether the answer in `text` equals the given one, end symbol included.

        A prompt left in front of `text` is taken off, and a chain of thought up to `</think>` is not compared.
        """
        return judge(self.alphabet, example, text)
