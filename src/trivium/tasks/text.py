"""Language modelling: every token of a corpus is predicted from those before it in its document.

Shapes: B rows, T tokens of a row, N tokens of a split's stream (`tasks.shards`).
"""

import dataclasses
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from trivium.registry import UserError
from trivium.tasks.answers import judge
from trivium.tasks.base import ANSWER, PAD, PROMPT, SPLITS, TASKS, Batch, Example, Split, Task, TaskConfig, Verdict
from trivium.tasks.byte_pairs import Vocabulary, load_byte_pairs
from trivium.tasks.shards import FORMAT, INDEX, Corpus, alphabet_of


@dataclass(frozen=True)
class Stretch(Example):
    """A row of a corpus: its tokens, of which the first is given. Its words alone do not tell them."""

    tokens: tuple[int, ...] = ()


@TASKS.register("text")
@dataclass(frozen=True)
class TextConfig(TaskConfig):
    """The next token of a corpus that `trivium data prepare` wrote; nothing is generated, perplexity is the score."""

    corpus: Path
    """Folder of the corpus."""
    length: int = 256
    """Tokens that a row reads; rows follow one another, and every token of the corpus is predicted once an epoch."""
    separate: bool = True
    """Keep the documents of a row apart: none reads what stands in the one before it."""
    tokenizer: str | None = None
    """Vocabulary that the corpus has to be of: a folder with a tokenizer's files, or a hub id (default: its own)."""
    alphabet: tuple[str, ...] | None = None
    """Symbols of the vocabulary of a corpus of characters, the end symbol last (default: its own)."""

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"length: expected 1 or more tokens, got {self.length}")
        if self.alphabet is not None and (len(self.alphabet) < 2 or self.tokenizer is not None):
            raise UserError("alphabet: expected two symbols or more, and no tokenizer beside them")

    def build(self) -> "Text":
        return Text(self)

    def resolved(self) -> "TextConfig":
        return self.build().config

    @classmethod
    def examples(cls, folder: Path | None = None) -> Sequence["TextConfig"]:
        if folder is None:
            return []
        corpus = folder / "letters"
        corpus.mkdir(exist_ok=True)
        letters = "abcdefgh"
        splits = {}
        for number, split in enumerate(SPLITS):
            draw = np.random.default_rng(number)
            documents = [draw.integers(0, len(letters), size).tolist() for size in (40, 3, 1, 90)]
            tokens = np.array([index for document in documents for index in (*document, len(letters))], np.uint16)
            starts = np.cumsum([0, *(len(document) + 1 for document in documents)])[:-1]
            file = f"{split}-00000.safetensors"
            save_file({"tokens": tokens, "starts": starts}, corpus / file)
            splits[split] = [{"file": file, "tokens": len(tokens), "documents": 4, "words": 0, "bytes": 134}]
        index = {"format": FORMAT, "name": "letters", "alphabet": [*letters, "<end>"], "splits": splits}
        (corpus / INDEX).write_text(json.dumps(index), encoding="utf-8")
        return [cls(corpus, length=16), cls(corpus, length=7, separate=False)]


class Text(Task):
    """The rows of TextConfig. Row r reads tokens r T .. r T + T - 1 of the stream, and predicts those behind each."""

    checks_answers = False
    config: TextConfig

    def __init__(self, config: TextConfig):
        # With the vocabulary at hand the corpus may be elsewhere, as when a trained model is loaded.
        self._given = config
        self.alphabet: Vocabulary
        if config.alphabet is not None:
            self.alphabet = alphabet_of(config.alphabet)
        else:
            self.alphabet = self.corpus.vocabulary if config.tokenizer is None else load_byte_pairs(config.tokenizer)
        self.max_length = config.length + 1
        self.packs_documents = config.separate
        own = self.corpus.vocabulary if config.alphabet is None and config.tokenizer is None else None
        characters = own is not None and self.corpus.index["alphabet"] is not None
        self.config = dataclasses.replace(
            config,
            alphabet=own.symbols if own is not None and characters else config.alphabet,
            tokenizer=str(config.corpus) if own is not None and not characters else config.tokenizer,
        )

    @cached_property
    def corpus(self) -> Corpus:
        """The opened corpus; UserError when it is not there, or of another vocabulary."""
        corpus, given = Corpus(self._given.corpus), self._given
        if given.alphabet is not None or given.tokenizer is not None:
            wanted = self.alphabet
            if corpus.vocabulary != wanted:
                raise UserError(
                    f"{corpus.folder}: its {len(corpus.vocabulary)} tokens are not those of the tokenizer that is "
                    f"asked for, which has {len(wanted)}; prepare the corpus with that one"
                )
        return corpus

    def size(self, split: Split) -> int | None:
        return -(-(self.corpus.size(split) - 1) // self.config.length)

    def _row(self, split: Split, index: int) -> np.ndarray:
        """Return the up to T + 1 tokens of a row: what it reads, and the last that it predicts."""
        size = self.size(split)
        if size is None or not 0 <= index < size:
            raise IndexError(f"the {split} split has {size} rows, there is no number {index}")
        return self.corpus.read(split, index * self.config.length, self.config.length + 1)

    def example(self, split: Split, index: int, stage: int = 0) -> Stretch:
        ids = self._row(split, index)
        return Stretch(self.alphabet.decode(ids[:1]), self.alphabet.decode(ids[1:]), {}, tuple(ids.tolist()))

    def canonical(self, example: Example) -> Hashable:
        return example.prompt + example.answer

    def encode(self, example: Example) -> tuple[list[int], list[int], list[float]]:
        if not isinstance(example, Stretch):
            return super().encode(example)
        ids = list(example.tokens)
        return ids[:-1], ids[1:], [1.0] * (len(ids) - 1)

    def regions(self, example: Example) -> list[int]:
        if not isinstance(example, Stretch):
            return super().regions(example)
        return [PROMPT] + [ANSWER] * (len(example.tokens) - 1)

    def verify(self, example: Example, text: str) -> Verdict:
        """Say that a stretch of a corpus has no right answer; compare exactly with one that somebody wrote."""
        if isinstance(example, Stretch):
            return Verdict(False, None, "a text has no answer to check")
        return judge(self.alphabet, example, text)

    def collate(self, examples: Sequence[Example]) -> Batch:
        if not all(isinstance(example, Stretch) for example in examples):
            return super().collate(examples)
        return self._batch([np.array(example.tokens) for example in examples if isinstance(example, Stretch)])

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        return self._batch([self._row(split, int(index)) for index in indices])

    def _batch(self, rows: Sequence[np.ndarray]) -> Batch:
        lengths_B = np.array([len(ids) - 1 for ids in rows], dtype=np.int64)
        pad = self.alphabet.pad_id
        ids_BT = np.full((len(rows), int(lengths_B.max(initial=0)) + 1), pad, dtype=np.int64)
        for b, ids in enumerate(rows):
            ids_BT[b, : len(ids)] = ids
        inside_BT = np.arange(ids_BT.shape[1] - 1) < lengths_B[:, None]
        documents_BT = None
        if self.config.separate:
            # A document is read from the end symbol in front of it on; that of padding is nobody's.
            begins_BT = (ids_BT[:, :-1] == self.alphabet.end_id) & inside_BT
            documents_BT = begins_BT.cumsum(axis=1)
            documents_BT -= documents_BT[:, :1]
            if not documents_BT.any():
                documents_BT = None
        return Batch(
            ids_BT[:, :-1].copy(),
            ids_BT[:, 1:].copy(),
            inside_BT.astype(np.float32),
            np.where(inside_BT, np.uint8(ANSWER), np.uint8(PAD)),
            lengths_B,
            np.ones(len(rows), dtype=np.int64),
            documents_BT,
        )
