"""Documents to shards of tokens, in several processes; what was written before is not made again.

Documents are taken in order and cut into groups of about as many bytes, so that a shard is the same however many
processes there are. A shard is written aside and renamed: one that is there is whole.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from trivium.data.documents import count_wikitext_words
from trivium.registry import UserError
from trivium.report.storage import write_whole
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.byte_pairs import BytePairs, Vocabulary, load_byte_pairs
from trivium.tasks.shards import Shard, ShardEntry, alphabet_of

SHARD_BYTES = 4 << 20  # of text


@dataclass(frozen=True)
class Encoder:
    """Text to tokens, in any process: the place of a byte-pair vocabulary, or the symbols of an alphabet."""

    place: str | None = None
    symbols: tuple[str, ...] | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The byte pairs or the alphabet."""
        return alphabet_of(self.symbols) if self.symbols is not None else load_byte_pairs(self.place or "")

    @property
    def fingerprint(self) -> str:
        """What names the vocabulary."""
        vocabulary = self.vocabulary
        if isinstance(vocabulary, BytePairs):
            return vocabulary.fingerprint
        return hashlib.sha256(json.dumps(vocabulary.symbols).encode()).hexdigest()[:16]

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The narrowest type that holds every token."""
        return np.uint16 if len(self.vocabulary) <= 1 << 16 else np.uint32

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of `text`, in which a special's name is text like any other."""
        vocabulary = self.vocabulary
        if isinstance(vocabulary, BytePairs):
            return vocabulary.encode_ordinary(text)
        return _characters(vocabulary, text)


def _characters(alphabet: Alphabet, text: str) -> np.ndarray:
    known = np.array([ord(symbol) for symbol in alphabet.symbols[:-1]], dtype=np.uint32)
    order = np.argsort(known)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    found = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    places = order[found]
    strange = np.flatnonzero(known[places] != codes)
    if len(strange):
        raise UserError(f"character {chr(codes[strange[0]])!r} is not in the alphabet of {len(alphabet)} symbols")
    return places


@dataclass(frozen=True)
class Group:
    """The documents of one shard. `key` names everything that its tokens depend on; `words` says whether to count."""

    path: Path
    key: str
    texts: tuple[str, ...]
    bytes: int
    words: bool


_encoder: Encoder | None = None


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    _ = encoder.vocabulary


def write_group(group: Group, encoder: Encoder | None = None) -> ShardEntry:
    """Encode the documents of a group and write its shard; OSError when there is no room for it."""
    encoder = encoder or _encoder
    assert encoder is not None
    end = np.array([encoder.vocabulary.end_id], dtype=encoder.dtype)
    parts: list[np.ndarray] = []
    starts, place = [], 0
    for text in group.texts:
        ids = encoder.encode(text).astype(encoder.dtype)
        starts.append(place)
        parts += [ids, end]
        place += len(ids) + 1
    words = sum(map(count_wikitext_words, group.texts)) if group.words else 0
    entry = ShardEntry(group.path.name, place, len(starts), words, group.bytes)
    tensors = {"tokens": np.concatenate(parts), "starts": np.array(starts, dtype=np.int64)}
    # One entry: of several the library chooses the order anew each time.
    write_whole(group.path, save(tensors, metadata={"shard": json.dumps({"key": group.key, **asdict(entry)})}))
    return entry


def written(path: Path, key: str) -> ShardEntry | None:
    """Return what the shard at `path` holds if it is there, whole, and made for `key`."""
    if not path.exists():
        return None
    try:
        said = json.loads(Shard(path).metadata["shard"])
        if said.pop("key") != key:
            return None
        return ShardEntry(**said)
    except (UserError, KeyError, TypeError, ValueError):
        return None


def grouped(
    folder: Path, documents: Iterator[tuple[str, str]], seed: str, *, words: bool, shard_bytes: int = SHARD_BYTES
) -> Iterator[tuple[str, Group]]:
    """Yield (split, group) of documents that come as (split, text); `seed` names what they come from."""
    waiting: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}

    def made(split: str) -> tuple[str, Group]:
        number = counts.get(split, 0)
        counts[split] = number + 1
        key = hashlib.sha256(json.dumps([seed, split, number, shard_bytes, words]).encode()).hexdigest()[:32]
        path = folder / f"{split}-{number:05d}.safetensors"
        group = Group(path, key, tuple(waiting.pop(split)), sizes.pop(split), words)
        return split, group

    for split, text in documents:
        waiting.setdefault(split, []).append(text)
        sizes[split] = sizes.get(split, 0) + len(text.encode("utf-8", "replace"))
        if sizes[split] >= shard_bytes:
            yield made(split)
    for split in list(waiting):
        yield made(split)


@contextmanager
def tokenisers(encoder: Encoder, jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Hold processes that load the vocabulary at once, while the caller still reads; None for one job: this process."""
    if jobs == 1:
        yield None
        return
    # Spawned: a fork would take the locks of torch's threads with it, without the threads.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(encoder,))
    try:
        pool.submit(os.getpid)  # starts them all
        yield pool
    except BrokenProcessPool:
        raise UserError(
            f"a process that tokenises ended by itself, as where memory runs out; give fewer than --jobs {jobs}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_shards(
    groups: Iterator[tuple[str, Group]],
    encoder: Encoder,
    pool: ProcessPoolExecutor | None,
    jobs: int,
    advance: Callable[[int, int, bool], None] = lambda done, tokens, new: None,
) -> dict[str, list[ShardEntry]]:
    """Write the shards that are not there yet and return all by split, in order.

    `advance` is told the bytes of text and the tokens of each shard, and whether it was made now. Raises OSError when a
    shard cannot be written, and BrokenProcessPool when a process of `pool` dies.
    """
    entries: dict[str, list[ShardEntry]] = {}
    running: dict[Future[ShardEntry], str] = {}

    def kept(split: str, entry: ShardEntry, new: bool) -> None:
        entries.setdefault(split, []).append(entry)
        advance(entry.bytes, entry.tokens, new)

    def collect(least: int) -> None:
        while len(running) > least:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                kept(running.pop(future), future.result(), True)

    for split, group in groups:
        found = written(group.path, group.key)
        if found is not None:
            kept(split, found, False)
        elif pool is None:
            kept(split, write_group(group, encoder), True)
        else:
            running[pool.submit(write_group, group)] = split
            collect(2 * jobs)  # more would only wait in memory
    collect(0)
    return {split: sorted(found, key=lambda entry: entry.file) for split, found in entries.items()}


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
