"""Word problems of JSONL files in GSM8K's format: `{"question": text, "answer": solution}`, the last line `#### n`."""

import dataclasses
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.base import SPLITS, TASKS, Example, Split
from trivium.tasks.byte_pairs import Vocabulary, load_byte_pairs
from trivium.tasks.calculator import annotations
from trivium.tasks.problem_files import END, ProblemFilesConfig
from trivium.tasks.word_answers import WordTask, number_of

SHAPE = 'expected {"question": text, "answer": a solution whose last line is #### and a number}'


@TASKS.register("word_problems")
@dataclass(frozen=True)
class WordProblemsConfig(ProblemFilesConfig):
    """Word problems of files like GSM8K's (arXiv 2110.14168); an answer is right when its last `#### n` is."""

    held_out: int = 473
    """Problems at the end of the training file that are for validation instead."""

    def build(self) -> "WordProblems":
        return WordProblems(self)

    def resolved(self) -> "WordProblemsConfig":
        return self.build().config

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["WordProblemsConfig"]:
        if folder is None:
            return []
        paths = {}
        for more, name in enumerate(("train", "test"), start=2):
            rows = []
            for a in range(more, 60, 2):
                solution = f"It is {a}+{more} = <<{a}+{more}={a + more}>>.\n#### {a + more}"
                rows.append({"question": f"{a} and {more}?", "answer": solution})
            paths[name] = folder / f"words_{name}.jsonl"
            paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return [cls(**paths, held_out=8)]


class WordProblems(WordTask):
    """The problems of WordProblemsConfig; a prompt is the question and a line break."""

    config: WordProblemsConfig

    def __init__(self, config: WordProblemsConfig):
        self._paths = {"train": config.train, "test": config.test}
        self._rows: dict[str, list[Example]] = {}
        self.config = config
        self.alphabet: Vocabulary = (
            load_byte_pairs(config.tokenizer)
            if config.tokenizer is not None
            else Alphabet(config.alphabet or self._characters(), tuple("0123456789"))
        )
        # With vocabulary and length at hand the files may be elsewhere, as when a trained model is loaded.
        self.max_length = config.max_length or max(
            self.tokens_of(example) for split in SPLITS if self._has(split) for example in self.problems(split)
        )
        alphabet = None if config.tokenizer is not None else self.alphabet.symbols
        self.config = dataclasses.replace(config, alphabet=alphabet, max_length=self.max_length)

    def _has(self, split: Split) -> bool:
        return split != "test" or self._paths["test"] is not None

    def _read(self, name: str) -> list[Example]:
        if name not in self._rows:
            path = self._paths[name]
            if path is None:
                raise UserError(f"the task has no {name} problems; give their file as task.{name}")
            end = END if self.config.tokenizer is None else load_byte_pairs(self.config.tokenizer).end
            self._rows[name] = read_word_problems(path, end)
        return self._rows[name]

    def _characters(self) -> tuple[str, ...]:
        rows = [row for name, path in self._paths.items() if path is not None for row in self._read(name)]
        found = {symbol for row in rows for symbol in row.prompt + row.answer.removesuffix(END)}
        return (*"0123456789", *sorted(found - set("0123456789")), END)

    def problems(self, split: Split) -> list[Example]:
        if split in self._rows and split == "validation":
            return self._rows[split]
        if split == "test":
            return self._read("test")
        rows = self._read("train")
        cut = len(rows) - self.config.held_out
        if cut < 1:
            raise UserError(
                f"held_out: {self.config.held_out} are asked for, {self._paths['train']} has {len(rows)} problems"
            )
        if "kept" not in self._rows:
            longest = self.config.longest
            kept = [row for row in rows[:cut] if longest is None or self.tokens_of(row) <= longest]
            if not kept:
                raise UserError(f"longest: no training problem has {longest} tokens or fewer")
            self._rows |= {"kept": kept, "validation": rows[cut:]}
        return self._rows["kept" if split == "train" else "validation"]

    def known_problems(self) -> list[Example]:
        """Return the whole training file: a baseline depends neither on `held_out` nor on `longest`."""
        return self._read("train")

    def canonical(self, example: Example) -> Hashable:
        return example.prompt


def read_word_problems(path: Path, end: str) -> list[Example]:
    """Return the problems of a file; UserError with file and line for a row that is not one."""
    rows: list[Example] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_problem(line, f"{path}:{number}", end))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; GSM8K's is train.jsonl of openai/grade-school-math") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise UserError(f"{path}: holds no problems; {SHAPE}")
    return rows


def _problem(line: str, where: str, end: str) -> Example:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {SHAPE}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object; {SHAPE}")
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: {key} is {'missing' if key not in row else 'not text'}; {SHAPE}")
    if number_of(row["answer"]) is None or number_of(row["answer"].splitlines()[-1]) is None:
        raise UserError(f"{where}: the answer has no #### line with a number at its end; {SHAPE}")
    if end in row["question"] + row["answer"]:
        raise UserError(f"{where}: holds {end}, which ends an answer")
    return Example(f"{row['question']}\n", row["answer"] + end, {"steps": len(annotations(row["answer"]))})
