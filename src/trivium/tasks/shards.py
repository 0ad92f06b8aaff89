"""Tokenised text on the disk: shards of documents, mapped into memory, and the index that makes a corpus of them.

A corpus is a folder with corpus.json and one safetensors file for each shard, which holds `tokens` (uint16, or uint32
for a large vocabulary), each document followed by the end symbol, and `starts` (int64), where each begins. corpus.json
is written last: a folder without it is no corpus yet. Its tokenizer's files lie beside it.

Shapes: N tokens of a split, the end symbol in front of the first document included.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.byte_pairs import Vocabulary, load_byte_pairs

INDEX = "corpus.json"
FORMAT = 1
_DTYPES = {"U16": np.uint16, "U32": np.uint32, "I64": np.int64}


@dataclass(frozen=True)
class ShardEntry:
    """What corpus.json knows of a shard; `words` are those that the corpus counts, 0 where it defines none."""

    file: str
    tokens: int
    documents: int
    words: int
    bytes: int


class Shard:
    """One file of tokens, mapped and not read. Raises UserError when it is cut short, or not what `entry` says."""

    def __init__(self, path: Path, entry: ShardEntry | None = None):
        header = read_header(path)
        self.metadata: dict[str, str] = header.get("__metadata__", {})
        try:
            self.tokens: np.ndarray = _mapped(path, header, "tokens")
            self.starts: np.ndarray = _mapped(path, header, "starts")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: no shard of tokens ({error})") from None
        found = len(self.tokens), len(self.starts)
        if entry is not None and found != (entry.tokens, entry.documents):
            raise UserError(
                f"{path}: {found[0]} tokens of {found[1]} documents where {INDEX} says {entry.tokens} of "
                f"{entry.documents}; prepare the corpus again"
            )


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file; UserError unless the file is there and whole."""
    try:
        with safe_open(path, framework="numpy"):  # compares the header with the size of the file
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; prepare the corpus again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cut short or damaged ({error}); prepare the corpus again") from None
    header["__data__"] = 8 + size
    return header


def _mapped(path: Path, header: dict[str, Any], name: str) -> np.ndarray:
    described = header[name]
    begin, end = described["data_offsets"]
    dtype = np.dtype(_DTYPES[described["dtype"]])
    if begin == end:  # nothing can be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r", offset=header["__data__"] + begin, shape=((end - begin) // dtype.itemsize,))


class Corpus:
    """The corpus that `trivium data prepare` wrote to `folder`.

    A split is one stream of N tokens: the end symbol, then each document and an end symbol behind it, so that every
    token of every document is predicted from an end symbol on. Raises UserError where files are missing, cut short, or
    disagree with corpus.json.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.name: str = self.index["name"]
        self._shards: dict[str, list[Shard]] = {}

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The alphabet or the byte pairs that the tokens are of."""
        symbols = self.index["alphabet"]
        if symbols is not None:
            return alphabet_of(symbols)
        found = load_byte_pairs(self.folder)
        if found.fingerprint != self.index["fingerprint"]:
            raise UserError(f"{self.folder}: its tokens are not of the tokenizer beside them; prepare the corpus again")
        return found

    def entries(self, split: str) -> list[ShardEntry]:
        """Return the shards of `split`."""
        return [ShardEntry(**entry) for entry in self.index["splits"].get(split, [])]

    def has(self, split: str) -> bool:
        """Say whether `split` has any text."""
        return any(entry.tokens for entry in self.entries(split))

    def count(self, split: str, what: str) -> int:
        """Return the number of "tokens" (end symbols included), "documents", "words" or "bytes" of `split`."""
        return sum(getattr(entry, what) for entry in self.entries(split))

    def size(self, split: str) -> int:
        """Return N, the tokens of the split's stream; UserError when the corpus has none."""
        if not self.has(split):
            raise UserError(f"{self.folder}: this corpus has no {split} text")
        return 1 + self.count(split, "tokens")

    def shards(self, split: str) -> list[Shard]:
        """Return the opened shards of `split`."""
        if split not in self._shards:
            self._shards[split] = [Shard(self.folder / entry.file, entry) for entry in self.entries(split)]
        return self._shards[split]

    def _firsts(self, split: str) -> list[int]:
        """Return the place in the stream of each shard's first token."""
        return (1 + np.cumsum([0, *(entry.tokens for entry in self.entries(split))])[:-1]).tolist()

    def read(self, split: str, start: int, count: int) -> np.ndarray:
        """Return tokens start .. start+count-1 of the stream as int64, fewer at its end."""
        parts = [np.full(1, self.vocabulary.end_id, np.int64)] if start == 0 and count > 0 else []
        start, count = max(start, 1), count - (start == 0)
        shards, firsts = self.shards(split), self._firsts(split)
        number = bisect_right(firsts, start) - 1
        while count > 0 and number < len(shards):
            inside = start - firsts[number]
            part = shards[number].tokens[inside : inside + count]
            parts.append(part.astype(np.int64))
            start, count, number = start + len(part), count - len(part), number + 1
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """Yield the tokens (int64) of each document, without the end symbol behind it."""
        for shard in self.shards(split):
            bounds = [*shard.starts.tolist(), len(shard.tokens)]
            for begin, end in pairwise(bounds):
                yield shard.tokens[begin : end - 1].astype(np.int64)


def alphabet_of(symbols: list[str] | tuple[str, ...]) -> Alphabet:
    """Return the alphabet of a corpus of characters, the end symbol last."""
    return Alphabet(
        tuple(symbols), tuple(digit for digit in "0123456789" if digit in symbols), symbols[-1], symbols[-1]
    )


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of corpus.json; UserError unless `folder` is a corpus that was prepared to the end."""
    path = folder / INDEX
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        begun = folder.is_dir() and any(folder.glob("*.safetensors"))
        why = "was not prepared to the end; run its command again" if begun else "trivium data prepare makes one"
        raise UserError(f"{folder}: no corpus: it has no {INDEX}; {why}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path}: not the index of a corpus that this version reads (format {FORMAT})")
    return index
