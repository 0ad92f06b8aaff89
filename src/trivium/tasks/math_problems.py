r"""Competition problems of JSONL files, `{"problem": text, "solution": text}`, with the answer in the last `\boxed{}`.

NuminaMath-CoT and MATH have this form. No problem of theirs is part of Trivium: `trivium data prepare` gets the files.
"""

import dataclasses
import json
import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.answers import strip_end
from trivium.tasks.base import ANSWER, CHAIN, PROMPT, SPLITS, TASKS, Batch, Example, Split, Task, Verdict
from trivium.tasks.byte_pairs import BytePairs, Vocabulary, load_byte_pairs
from trivium.tasks.math_answers import (
    boxed_span,
    equal,
    equal_as_text,
    equal_by_math_verify,
    has_math_verify,
    last_boxed,
    math_verify_reads,
)
from trivium.tasks.problem_files import END, ProblemFilesConfig

SHAPE = 'expected {"problem": text, "solution": text with its answer in \\boxed{}}'
TOGETHER = 2048  # problems whose tokens are counted at once

_log = logging.getLogger("trivium")


@TASKS.register("math_problems")
@dataclass(frozen=True)
class MathProblemsConfig(ProblemFilesConfig):
    r"""Problems with solutions like MATH's and NuminaMath-CoT's; what counts is the last `\boxed{}` of an answer."""

    def build(self) -> "MathProblems":
        return MathProblems(self)

    def resolved(self) -> "MathProblemsConfig":
        return self.build().config

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["MathProblemsConfig"]:
        if folder is None:
            return []
        paths = {}
        for more, name in enumerate(("train", "test"), start=2):
            rows = [
                {"problem": f"What is ${a}+{more}$?", "solution": f"It is ${a}+{more}$, so \\boxed{{{a + more}}}"}
                for a in range(8 + more, 68, 2)
            ]
            paths[name] = folder / f"math_{name}.jsonl"
            paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return [cls(**paths, held_out=8)]


class Rows(Sequence[Example]):
    """The problems of a file, of which only the places are kept: a row is read when it is asked for."""

    def __init__(self, path: Path, end: str, offsets: np.ndarray):
        self.path, self.end, self.offsets = path, end, offsets

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self.path, self.end, self.offsets[index])
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            line = file.readline()
        example = problem_of(line, f"{self.path} at byte {self.offsets[index]}", self.end)
        assert example is not None
        return example

    def __iter__(self) -> Iterator[Example]:
        with self.path.open("rb") as file:
            for offset in self.offsets.tolist():
                file.seek(offset)
                example = problem_of(file.readline(), f"{self.path} at byte {offset}", self.end)
                assert example is not None
                yield example

    def kept(self, chosen: np.ndarray) -> "Rows":
        """Return those rows that the mask `chosen` names."""
        return Rows(self.path, self.end, self.offsets[chosen])


@lru_cache(maxsize=8)
def _read(path: Path, end: str, stamp: tuple[int, int]) -> Rows:
    offsets, place, without = [], 0, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    if problem_of(line, f"{path}:{number}", end) is None:
                        without += 1
                    else:
                        offsets.append(place)
                place += len(line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if without:
        _log.warning("%s: %s of %s problems have no \\boxed{} answer: left out", path, without, without + len(offsets))
    if not offsets:
        raise UserError(f"{path}: holds no problems; {SHAPE}")
    return Rows(path, end, np.array(offsets, dtype=np.int64))


def read_math_problems(path: Path, end: str) -> Rows:
    """Return the problems of a file, those without a boxed answer left out and counted in the log.

    Raises UserError with file and line for a row that is not one.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; trivium data prepare gets such files") from None
    return _read(path, end, (status.st_size, status.st_mtime_ns))


def problem_of(line: bytes, where: str, end: str) -> Example | None:
    """Return the problem of a line, None if its solution has no boxed answer; UserError if it is no such row."""
    try:
        row: Any = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {SHAPE}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object; {SHAPE}")
    for key in ("problem", "solution"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: {key} is {'missing' if key not in row else 'not text'}; {SHAPE}")
    if end in row["problem"] + row["solution"]:
        raise UserError(f"{where}: holds {end}, which ends an answer")
    if not last_boxed(row["solution"]):
        return None
    tags = {name: row[name] for name in ("subject", "level", "source") if isinstance(row.get(name), int | str)}
    return Example(f"{row['problem'].strip()}\n", row["solution"].strip() + end, tags)


class MathProblems(Task):
    """The problems of MathProblemsConfig. A prompt is the problem and a line break; the solution up to the answer is
    CHAIN, what stands in the last box, and behind it, ANSWER."""

    reads_values = True
    config: MathProblemsConfig

    def __init__(self, config: MathProblemsConfig):
        self.config = config
        self._kept: dict[Split, Rows] = {}
        pairs = None if config.tokenizer is None else load_byte_pairs(config.tokenizer)
        self._end = END if pairs is None else pairs.end
        self.alphabet: Vocabulary = pairs or Alphabet(config.alphabet or self._characters(), tuple("0123456789"))
        # With vocabulary and length at hand the files may be elsewhere, as when a trained model is loaded.
        self.max_length = config.max_length or self._longest()
        alphabet = None if config.tokenizer is not None else self.alphabet.symbols
        self.config = dataclasses.replace(config, alphabet=alphabet, max_length=self.max_length)

    def _has(self, split: Split) -> bool:
        return split != "test" or self.config.test is not None

    def _rows(self, name: str) -> Rows:
        path = getattr(self.config, name)
        if path is None:
            raise UserError(f"the task has no {name} problems; give their file as task.{name}")
        return read_math_problems(path, self._end)

    def _characters(self) -> tuple[str, ...]:
        names = [name for name in ("train", "test") if getattr(self.config, name) is not None]
        found = {
            symbol for name in names for row in self._rows(name) for symbol in row.prompt + row.answer[: -len(END)]
        }
        return (*"0123456789", *sorted(found - set("0123456789")), END)

    def _longest(self) -> int:
        return max(int(self._lengths(self.problems(split)).max()) for split in SPLITS if self._has(split))

    def _lengths(self, rows: Rows) -> np.ndarray:
        """Return the tokens of each problem with its solution, the end symbol included."""
        alphabet, lengths = self.alphabet, []
        if len(rows) > TOGETHER:
            _log.info("%s: counting the tokens of %s problems", rows.path, f"{len(rows):,}")
        examples = iter(rows)
        while part := list(islice(examples, TOGETHER)):
            if isinstance(alphabet, BytePairs):
                texts = [text for row in part for text in (row.prompt, row.answer.removesuffix(self._end))]
                counts = np.array([len(ids) for ids in alphabet.encode_many(texts, threads=2)]).reshape(-1, 2)
                lengths.append(counts.sum(axis=1) + 1)
            else:
                lengths.append(np.array([len(alphabet.encode(row.prompt + row.answer)) for row in part]))
        return np.concatenate(lengths)

    def problems(self, split: Split) -> Rows:
        """Return the problems of `split`; UserError when the task has none."""
        if split == "test":
            return self._rows("test")
        if split not in self._kept:
            rows = self._rows("train")
            cut = len(rows) - self.config.held_out
            if cut < 1:
                raise UserError(
                    f"held_out: {self.config.held_out} are asked for, {self.config.train} has {len(rows)} problems"
                )
            kept = rows[:cut]
            if split == "validation":
                kept = rows[cut:]
            elif self.config.longest is not None:
                kept = kept.kept(self._lengths(kept) <= self.config.longest)
                if not len(kept):
                    raise UserError(f"longest: no training problem has {self.config.longest} tokens or fewer")
            self._kept[split] = kept
        return self._kept[split]

    def size(self, split: Split) -> int | None:
        return len(self.problems(split))

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        problems = self.problems(split)
        if not 0 <= index < len(problems):
            raise IndexError(f"the {split} split has {len(problems)} problems, there is no number {index}")
        example: Example = problems[index]
        names = self._shared_tags
        return dataclasses.replace(example, tags={name: example.tags[name] for name in names if name in example.tags})

    @property
    def _shared_tags(self) -> tuple[str, ...]:
        """Names of the tags that the first problem of every split has."""
        if not hasattr(self, "_tags"):
            found = [set(self.problems(split)[0].tags) for split in SPLITS if self._has(split)]
            self._tags = tuple(sorted(set.intersection(*found)))
        return self._tags

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        if len(examples) and int(batch.lengths_B.max()) + 1 > self.max_length:
            longest = int(batch.lengths_B.max()) + 1
            raise UserError(f"max_length: {self.max_length} is given, a problem has {longest} tokens")
        return batch

    def canonical(self, example: Example) -> Hashable:
        return example.prompt

    def regions(self, example: Example) -> list[int]:
        ids = self.alphabet.encode(example.answer)
        span = boxed_span(example.answer)
        begin = len(example.answer[: span[0]].encode()) if span else 0
        # In bytes, since a token may be part of a character.
        ends = np.cumsum([len(token) for token in map(self._bytes, ids)])
        prompt = len(self.alphabet.encode(example.prompt))
        return [PROMPT] * prompt + [ANSWER if end > begin else CHAIN for end in ends]

    def _bytes(self, index: int) -> bytes:
        if isinstance(self.alphabet, BytePairs):
            return self.alphabet.token_bytes(index)
        return self.alphabet.symbols[index].encode()

    def _read_answers(self, example: Example, text: str) -> tuple[str | None, str, bool]:
        body, ended = strip_end(self.alphabet, text.removeprefix(example.prompt))
        answer = strip_end(self.alphabet, example.answer)[0]
        # A person's own row may have the answer alone.
        return last_boxed(body) or None, last_boxed(answer) or answer.strip(), ended

    def verify(self, example: Example, text: str) -> Verdict:
        r"""Decide whether what stands in the last `\boxed{}` of `text` equals the answer; its end has to follow."""
        given, wanted, ended = self._read_answers(example, text)
        if given is None:
            return Verdict(False, None, "there is no \\boxed{} answer")
        if not ended:
            return Verdict(False, given, "the answer does not end")
        correct = equal(given, wanted)
        return Verdict(correct, given, "" if correct else f"{wanted} is right")

    def readings(self, example: Example, text: str) -> dict[str, Verdict]:
        """Return the verdicts of both ways to compare that are at hand, neither of which asks for an end symbol.

        Of "math_verify" the `judge` says whether it or the comparison of texts decided.
        """
        given, wanted, _ = self._read_answers(example, text)
        found = {"normalised": Verdict(given is not None and equal_as_text(given, wanted), given)}
        if has_math_verify():
            judge = None if given is None else "math_verify" if math_verify_reads(given, wanted) else "text"
            correct = given is not None and equal_by_math_verify(given, wanted)
            found["math_verify"] = Verdict(correct, given, judge=judge)
        return found
