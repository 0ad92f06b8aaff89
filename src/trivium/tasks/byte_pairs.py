"""Byte-pair vocabularies (GPT-2's and those trained like it) with the interface of an alphabet.

A token is a piece of bytes; text is cut by GPT-2's pattern, and in each piece the pair of neighbours whose union is
the oldest token is joined until none is left (Sennrich et al., arXiv 1508.07909; over bytes as in the GPT-2 report).
tiktoken does that, so this needs extra `hf`.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.download import hub_file, names_repository, require_extra

END = "<|endoftext|>"
GPT2_SIZE = 50_257
# Repositories whose tokenizer is GPT-2's own: 256 bytes, 50,000 merges and the end symbol.
GPT2_NAMES = ("gpt2", "openai-community/gpt2")
# Contractions, then runs of letters, numbers or others with a blank before them, then blanks but for the last before
# a word. Possessive runs, because a regular expression that goes back costs a stack.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
FILE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
FILES = (TOKENIZER_FILE, CONFIG_FILE, *(name for pair in FILE_PAIRS for name in pair))
# The same pieces without looking ahead, which is faster (`trivium bench tokenise`), once MARK stands before the last of
# several blanks that a word follows.
PLAIN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
MARK = "\U0010ffff"
LONG_TEXT = 1 << 12  # characters from which on marking pays
HUGE_TEXT = 1 << 25  # characters from which on it would take too much memory
# A longer run of blanks would overflow tiktoken's stack, and is handed over alone.
LONG_GAP = 1 << 16
_BLANK = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_FAR_BLANKS = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_FORWARD, _BACKWARD = re.compile(f"{_BLANK}*"), re.compile(_BLANK)


def byte_characters() -> dict[int, str]:
    """Return the character that stands for each byte in GPT-2's files: itself if it can be seen, else one of 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


_CHARACTERS = byte_characters()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def to_characters(token: bytes) -> str:
    """Return how GPT-2's files write a token."""
    return "".join(_CHARACTERS[byte] for byte in token)


def from_characters(text: str) -> bytes:
    """Return the token that GPT-2's files write as `text`; KeyError if a character stands for no byte."""
    return bytes(_BYTES[character] for character in text)


@dataclass(frozen=True, eq=False)
class BytePairs:
    """Byte-pair tokens with their ids, the merges that make them (oldest first), and specials such as the end symbol.

    Raises ValueError unless ids are 0, 1, 2 ..., every byte is a token, and every other token is made by a merge of
    older ones. Where two merges make one token, only the first counts.
    """

    ids: Mapping[bytes, int]
    merges: tuple[tuple[bytes, bytes], ...]
    specials: Mapping[str, int]
    end: str = END
    pad: str = END

    def __post_init__(self):
        taken = sorted([*self.ids.values(), *self.specials.values()])
        if taken != list(range(len(taken))):
            raise ValueError("token ids are not 0, 1, 2 ... each once")
        missing = [byte for byte in range(256) if bytes([byte]) not in self.ids]
        if missing:
            raise ValueError(f"{len(missing)} of the 256 single bytes are not tokens, so that not every text has any")
        for symbol in (self.end, self.pad):
            if symbol not in self.specials:
                raise ValueError(f"{symbol} is not among its special tokens: {', '.join(self.specials) or 'none'}")
        kept: dict[bytes, tuple[bytes, bytes]] = {}
        newest = -1
        for left, right in self.merges:
            made = left + right
            if any(piece not in self.ids for piece in (left, right, made)):
                raise ValueError(f"the merge {to_characters(left)} {to_characters(right)} is of pieces without an id")
            if made in kept:
                continue
            if self.ids[made] < newest:
                raise ValueError(
                    f"the ids of merged tokens are not in the order of the merges at {to_characters(made)}"
                )
            newest = self.ids[made]
            kept[made] = (left, right)
        if len(self.ids) != 256 + len(kept):
            raise ValueError(f"{len(self.ids)} tokens are not the 256 bytes and what {len(kept)} merges make")
        object.__setattr__(self, "merges", tuple(kept.values()))

    def __len__(self) -> int:
        return len(self.ids) + len(self.specials)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, BytePairs) and self.fingerprint == other.fingerprint)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name all tokens, their ids, and the end and pad symbols."""
        written = [self.end, self.pad, sorted(self.specials.items()), *map(bytes.hex, self._tokens)]
        return hashlib.sha256(json.dumps(written).encode()).hexdigest()[:16]

    @cached_property
    def _tokens(self) -> list[bytes]:
        """The bytes of each id, a special's those of its name."""
        named = {index: token for token, index in self.ids.items()}
        named |= {index: name.encode() for name, index in self.specials.items()}
        return [named[index] for index in range(len(self))]

    @cached_property
    def _encoding(self) -> Any:
        require_extra("tiktoken", "a byte-pair vocabulary")
        import tiktoken

        return tiktoken.Encoding(
            f"trivium-{self.fingerprint}",
            pat_str=PATTERN,
            mergeable_ranks=dict(self.ids),
            special_tokens=dict(self.specials),
        )

    @cached_property
    def _marked_encoding(self) -> Any:
        import tiktoken

        return tiktoken.Encoding(
            f"trivium-{self.fingerprint}-marked",
            pat_str=PLAIN,
            mergeable_ranks=dict(self.ids),
            special_tokens={MARK: len(self)},
        )

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """What to show for each id; bytes that are no text of their own as U+FFFD."""
        return tuple(token.decode("utf-8", errors="replace") for token in self._tokens)

    @property
    def digits(self) -> tuple[str, ...]:
        """No symbol: a token may hold several digits, so that runs of them cannot be counted."""
        return ()

    @property
    def digit_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def end_id(self) -> int:
        return self.specials[self.end]

    @property
    def pad_id(self) -> int:
        return self.specials[self.pad]

    def id_of(self, symbol: str) -> int:
        """Return the id of the token that is exactly `symbol`; KeyError if there is none."""
        return self.specials[symbol] if symbol in self.specials else self.ids[symbol.encode()]

    def token_bytes(self, index: int) -> bytes:
        """Return the bytes of token `index`."""
        return self._tokens[index]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; a special's name in it is that special."""
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part in self.specials:
                ids.append(self.specials[part])
            elif part:
                ids += self.encode_ordinary(part).tolist()
        return ids

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Return the ids of `text` as uint32, a special's name in it being text like any other."""
        parts = [self._encode_part(part) for part in _between_gaps(_valid(text))]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint32), *parts])

    def _encode_part(self, text: str) -> np.ndarray:
        plain = self._encoding
        if not LONG_TEXT <= len(text) < HUGE_TEXT or MARK in text:
            return plain.encode_to_numpy(text, disallowed_special=())
        ids = self._marked_encoding.encode_to_numpy(_marked(text), allowed_special={MARK}, disallowed_special=())
        return ids[ids != len(self)]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return `encode_ordinary` of each text as a list, on `threads` threads that do not hold the interpreter."""
        texts = [_valid(text) for text in texts]
        plain = [text for text in texts if len(text) < LONG_GAP]
        encoded = iter(self._encoding.encode_ordinary_batch(plain, num_threads=threads))
        return [next(encoded) if len(text) < LONG_GAP else self.encode_ordinary(text).tolist() for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids, specials written out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._tokens[int(index)] for index in ids).decode("utf-8", errors="replace")

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @classmethod
    def from_tokenizers(cls, tokenizer: Any, end: str = END, pad: str | None = None) -> "BytePairs":
        """Return the vocabulary of a trained `tokenizers.Tokenizer`; UserError if it is not one of GPT-2's kind."""
        return _of_json(json.loads(tokenizer.to_str()), end, pad or end, "the tokenizer")


Vocabulary = Alphabet | BytePairs


def _valid(text: str) -> str:
    """Return `text` with halves of surrogate pairs, which no bytes can hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _marked(text: str) -> str:
    """Return `text` with MARK before the last of two or more blanks behind which a word begins."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    blank = (codes == ord(" ")) | (codes - ord("\t") < 5)  # unsigned: what is below a tab is far above
    for symbol in _FAR_BLANKS:
        if symbol in text:
            blank |= codes == ord(symbol)
    places = np.flatnonzero(blank[:-2] & blank[1:-1] & ~blank[2:]) + 1
    ends = [0, *places.tolist(), len(text)]
    return MARK.join([text[start:end] for start, end in pairwise(ends)])


def _between_gaps(text: str) -> Iterator[str]:
    """Yield `text` in parts that have the same tokens alone, so that a long run of blanks ends its part."""
    done = 0
    for place in range(0, len(text), LONG_GAP):  # a long run covers one of these places
        if place < done or not _BACKWARD.match(text, place):
            continue
        end = _FORWARD.match(text, place).end()  # pyright: ignore[reportOptionalMemberAccess]
        start = place
        while start > done and _BACKWARD.match(text, start - 1):
            start -= 1
        if end - start < LONG_GAP:
            continue
        # The last blank belongs to the word behind it, if there is one.
        last = end if end == len(text) else end - 1
        if start > done:
            yield text[done:start]
        yield text[start:last]
        done = last
    if done < len(text):
        yield text[done:]


def load_byte_pairs(place: str | Path) -> BytePairs:
    """Return the vocabulary that `place` names: a folder with a tokenizer's files, or a repository of the hub.

    The files are vocab.json and merges.txt, encoder.json and vocab.bpe, or tokenizer.json. One object is made for each
    place. Raises UserError when they are missing, damaged, of another kind, or, for gpt2, not 50,257 tokens.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir() or not str(place):
        return _load(str(place), None)
    folder = folder.resolve()
    stamps = ((path.name, path.stat().st_mtime_ns) for path in map(folder.joinpath, FILES) if path.exists())
    return _load(str(folder), tuple(stamps))


@lru_cache(maxsize=8)
def _load(place: str, stamps: tuple[tuple[str, int], ...] | None) -> BytePairs:
    if stamps is not None:
        return read_folder(Path(place))
    if Path(place).exists() or not names_repository(place):
        raise UserError(f"tokenizer: {place}: no such folder, nor the name of a hub repository such as gpt2")
    vocabulary, merges = (
        hub_file(place, name, f"without a network, give a folder that holds {FILE_PAIRS[0][0]} and {FILE_PAIRS[0][1]}")
        for name in FILE_PAIRS[0]
    )
    found = _of_pair(vocabulary, merges)
    if place in GPT2_NAMES and len(found) != GPT2_SIZE:
        raise UserError(
            f"tokenizer: {place}: {len(found)} tokens where GPT-2 has {GPT2_SIZE}; its files are of another"
        )
    return found


def read_folder(folder: Path) -> BytePairs:
    """Return the vocabulary whose files lie in `folder`; the errors are those of `load_byte_pairs`."""
    if (folder / TOKENIZER_FILE).is_file():
        config = _read(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        end = _name(config.get("eos_token")) or END
        return _of_json(
            _read(folder / TOKENIZER_FILE), end, _name(config.get("pad_token")) or end, folder / TOKENIZER_FILE
        )
    for vocabulary, merges in FILE_PAIRS:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _of_pair(folder / vocabulary, folder / merges)
    pairs = " or ".join(f"{vocabulary} and {merges}" for vocabulary, merges in FILE_PAIRS)
    raise UserError(f"tokenizer: {folder}: holds no tokenizer; expected {TOKENIZER_FILE}, or {pairs}")


def _name(token: Any) -> str | None:
    """Return a special token's text, which configs write plain or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _of_pair(vocabulary: Path, merges: Path) -> BytePairs:
    ids = _read(vocabulary)
    lines = _text(merges).split("\n")
    pairs = [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :] if line.strip()]
    return _make(ids, [pair.split(" ") for pair in pairs], {}, END, END, vocabulary)


def _of_json(described: Any, end: str, pad: str, where: Any) -> BytePairs:
    try:
        model, cut = described["model"], described["pre_tokenizer"]
        if model["type"] != "BPE" or cut["type"] != "ByteLevel" or cut["add_prefix_space"] or described["normalizer"]:
            raise ValueError("it is not byte-level BPE")
        if not cut.get("use_regex", True):
            raise ValueError("it does not cut text by GPT-2's pattern")
        merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
        specials = {str(token["content"]): int(token["id"]) for token in described["added_tokens"]}
        vocabulary = dict(model["vocab"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"tokenizer: {where}: cannot be used ({error}); expected byte-level BPE like GPT-2's") from None
    return _make(vocabulary, merges, specials, end, pad, where)


def _make(
    vocabulary: Any, merges: list[list[str]], specials: dict[str, int], end: str, pad: str, where: Any
) -> BytePairs:
    """Return the vocabulary of a file's names and ids; a name that is `end` or `pad` is special in any case."""
    try:
        specials = specials | {name: vocabulary[name] for name in (end, pad) if name in vocabulary}
        ids = {from_characters(name): int(index) for name, index in vocabulary.items() if name not in specials}
        pairs = tuple((from_characters(left), from_characters(right)) for left, right in merges)
        return BytePairs(ids, pairs, specials, end, pad)
    except KeyError as error:
        raise UserError(
            f"tokenizer: {where}: character {error} stands for no byte; expected GPT-2's spelling"
        ) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"tokenizer: {where}: {error}") from None


def _read(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"tokenizer: {path}: not JSON ({error})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer: {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
