"""From files to what a task reads: shards of tokens for text, JSON lines for problems.

Everything is written aside and renamed, and the index last, so that a command that was killed goes on when it is run
again, and nothing half-written is ever taken for a corpus.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.data.corpora import KNOWN, Source
from trivium.data.documents import UNFINISHED, articles_of, documents_of, field_of, rows_of
from trivium.data.overlap import problems_in, signature
from trivium.data.tokenise import SHARD_BYTES, Encoder, grouped, tokenisers, write_shards
from trivium.data.tokenizers import BytePairTokenizer
from trivium.registry import UserError
from trivium.report.storage import make_folders, naming, sync_folder, write_whole
from trivium.tasks.base import SPLITS
from trivium.tasks.byte_pairs import BytePairs
from trivium.tasks.shards import FORMAT, INDEX, ShardEntry

SOURCE = "source.json"
SMALL = 3  # documents from which on whole ones are held out
REMEMBERED = 1 << 27  # bytes of text up to which documents stay in memory instead of being read a second time
_log = logging.getLogger("trivium")


@dataclass
class Progress:
    """How far a corpus is: bytes of text in all and done, and the tokens that were made now and before."""

    total: int = 0
    done: int = 0
    tokens: int = 0
    kept: int = 0
    show: Callable[["Progress"], None] = field(default=lambda progress: None)

    def advance(self, done: int, tokens: int, new: bool) -> None:
        """Count a shard."""
        self.done += done
        if new:
            self.tokens += tokens
        else:
            self.kept += tokens
        self.show(self)


@dataclass(frozen=True)
class Plan:
    """What a first reading of the documents found: how many there are, and which split each belongs to."""

    splits: list[str]
    bytes: int
    symbols: tuple[str, ...]
    cut: dict[str, int] = field(default_factory=dict)
    texts: list[str] | None = None
    """The documents themselves, where they are small enough to be kept."""


def _documents(name: str, sources: list[Source], key: str) -> Iterator[tuple[Source, str]]:
    known = KNOWN.get(name)
    for source in sources:
        articles = known is not None and known.shape == "articles"
        for text in articles_of(source.path) if articles else documents_of(source.path, key):
            if text:
                yield source, text


def make_plan(name: str, sources: list[Source], key: str, held_out: float, characters: bool = False) -> Plan:
    """Read all documents once and decide where each belongs.

    Where every file's name tells its split, that is it, and beside a file for test or validation those that tell none
    are for training. Otherwise the documents whose hashes are smallest are test, and the next ones validation, until
    each has the share `held_out` of the bytes; of fewer than three documents the last one's end is cut off for them.
    Raises UserError for a text of 0 tokens.
    """
    digests, sizes, told, symbols = [], [], [], set()
    texts: list[str] | None = []
    total = 0
    for source, text in _documents(name, sources, key):
        content = text.encode("utf-8", "replace")
        digests.append(hashlib.blake2b(content, digest_size=8).digest())
        sizes.append(len(content))
        told.append(source.split)
        total += len(content)
        if total > REMEMBERED:
            texts = None
        if texts is not None:
            texts.append(text)
        if characters:
            symbols |= set(text)
    if not sizes:
        raise UserError(f"{', '.join(source.path.name for source in sources)}: a text of 0 tokens; give some text")
    ordered = tuple(sorted(symbols))
    unnamed = sorted({source.path.name for source in sources if source.split is None})
    if all(split is not None for split in told) or {"validation", "test"} & set(told):
        if unnamed:
            _log.info("%s: for training, since other files' names say test or validation", ", ".join(unnamed))
        splits = [split or "train" for split in told]
        if "train" not in splits:
            _log.warning("%s: no train file is among these; the corpus can be scored on, not trained on", name)
        return Plan(splits, total, ordered, texts=texts)
    if not 0 < held_out < 0.5:
        raise UserError(f"--held-out: expected a share above 0 and below 0.5, got {held_out}")
    share = held_out * total
    if len(sizes) < SMALL:
        return Plan(["train"] * len(sizes), total, ordered, {"validation": int(share), "test": int(share)}, texts)
    splits = ["train"] * len(sizes)
    # Of equal documents all are in one split.
    order = sorted(range(len(sizes)), key=lambda number: (digests[number], number))
    place = 0
    for split in ("test", "validation"):
        taken = 0
        while place < len(order) and (taken < share or digests[order[place]] == digests[order[place - 1]]):
            splits[order[place]] = split
            taken += sizes[order[place]]
            place += 1
    if "train" not in splits:
        raise UserError(f"--held-out: {held_out} leaves no document of {len(sizes)} to train on")
    return Plan(splits, total, ordered, texts=texts)


def _split_up(plan: Plan, documents: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield (split, text) of the documents of a plan."""
    for number, (split, text) in enumerate(zip(plan.splits, documents, strict=True), start=1):
        if plan.cut and number == len(plan.splits):
            yield from _cut(text, plan.cut)
        else:
            yield split, text


def _cut(text: str, shares: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield a document's beginning as train and its end as validation and test, cut behind a line or a word."""
    wanted = max(1, round(len(text) * sum(shares.values()) / max(1, len(text.encode("utf-8", "replace")))))
    places = [max(1, len(text) - wanted), max(2, len(text) - wanted // 2)]
    places = [_behind_word(text, place) for place in places]
    parts = text[: places[0]], text[places[0] : places[1]], text[places[1] :]
    if not all(parts):
        raise UserError("--held-out: the text is too short to hold any of it out; give more text, or a larger share")
    yield from zip(("train", "validation", "test"), parts, strict=True)


def _behind_word(text: str, place: int) -> int:
    for mark in ("\n", " "):
        found = text.rfind(mark, place // 2, place)
        if found >= 0:
            return found + 1
    return place


def prepare_text(
    name: str,
    sources: list[Source],
    folder: Path,
    tokenizer: str | None,
    *,
    key: str = "text",
    held_out: float = 0.01,
    jobs: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the corpus to `folder` and return what its corpus.json holds, with "tokens_per_second" of this run.

    `tokenizer` is a place of byte pairs, or None for one token a character. Raises UserError for sources that cannot
    be read, and when `folder` holds something else, and OSError when it cannot be written.
    """
    progress = progress or Progress()
    make_folder(folder)
    (folder / INDEX).unlink(missing_ok=True)  # what is made anew is no corpus until it is whole
    began = time.perf_counter()
    encoder, plan = Encoder(tokenizer), None
    if tokenizer is None:
        plan = make_plan(name, sources, key, held_out, characters=True)
        encoder = Encoder(symbols=(*plan.symbols, "<end>"))
        jobs = 1  # looking characters up is faster than handing them to another process
    made_from = [source.record() for source in sources]
    fingerprint, vocabulary = encoder.fingerprint, encoder.vocabulary
    with tokenisers(encoder, jobs) as pool:
        plan = plan or make_plan(name, sources, key, held_out)
        places = hashlib.sha256(json.dumps(plan.splits).encode()).hexdigest()
        seed = json.dumps([FORMAT, name, made_from, fingerprint, key, held_out, places])
        words = name in KNOWN and KNOWN[name].shape == "articles"
        progress.total = plan.bytes
        progress.show(progress)
        counted = time.perf_counter()
        read = iter(plan.texts) if plan.texts is not None else (text for _, text in _documents(name, sources, key))
        groups = grouped(folder, _split_up(plan, read), seed, words=words, shard_bytes=shard_bytes)
        entries = write_shards(groups, encoder, pool, jobs, progress.advance)
        ended = time.perf_counter()
    known = KNOWN.get(name)
    if isinstance(vocabulary, BytePairs):
        with naming(folder):
            BytePairTokenizer(vocabulary).save(folder)
    index = {
        "format": FORMAT,
        "name": name,
        "licence": known.licence if known else None,
        "repository": known.repository if known else None,
        "revision": known.revision if known else None,
        "sources": made_from,
        "held_out": held_out,
        "vocabulary": len(vocabulary),
        "fingerprint": fingerprint,
        "alphabet": None if isinstance(vocabulary, BytePairs) else list(vocabulary.symbols),
        "splits": {split: [dataclasses.asdict(entry) for entry in entries.get(split, [])] for split in SPLITS},
    }
    _remove_others(folder, entries)
    write_whole(folder / INDEX, json.dumps(index, indent=1) + "\n")
    seconds = ended - counted
    return {
        **index,
        "tokens": {split: sum(entry.tokens for entry in entries.get(split, [])) for split in SPLITS},
        "documents": {split: sum(entry.documents for entry in entries.get(split, [])) for split in SPLITS},
        "made": progress.tokens,
        "kept": progress.kept,
        "jobs": jobs,
        "seconds": {"reading": counted - began, "tokenising": seconds},
        "tokens_per_second": progress.tokens / seconds if progress.tokens else None,
    }


def make_folder(folder: Path) -> None:
    """Make the folder of a corpus; UserError when it holds something else than one that was made or begun."""
    make_folders(folder)
    names = [path.name for path in folder.iterdir()]
    ours = {INDEX, SOURCE, "tokenizer.json", "tokenizer_config.json"}
    strangers = [
        name
        for name in names
        if name not in ours and not name.startswith(".") and name.split("-")[0].split(".")[0] not in SPLITS
    ]
    if strangers:
        raise UserError(f"{folder}: holds {min(strangers)}, which is of no corpus; give another folder with --out")
    for path in folder.glob(".*.tmp"):
        if path.name != UNFINISHED:  # stands until all is made anew
            path.unlink()


def _remove_others(folder: Path, entries: dict[str, list[ShardEntry]]) -> None:
    """Remove shards of what the folder held before."""
    kept = {entry.file for found in entries.values() for entry in found}
    for path in folder.glob("*.safetensors"):
        if path.name not in kept:
            path.unlink()


def prepare_problems(name: str, sources: list[Source], folder: Path, *, without: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the problems of each split as JSON lines, every row checked, and return what source.json holds.

    Training problems that the files, or folders of files, in `without` have too are left out and counted, see
    `overlap.signature`. Every file is written aside first, so that what cannot be read leaves the folder as it was;
    where a killed command left only some in their places, UNFINISHED says so. Raises UserError with file and row for a
    row without the fields, and OSError when a file cannot be written.
    """
    known, unfinished = KNOWN[name], folder / UNFINISHED
    if unfinished.exists():
        _log.warning("%s: was not prepared to the end by an earlier command; all of it is made anew", folder)
    make_folder(folder)
    by_split: dict[str, list[Source]] = {}
    for source in sources:
        split = source.split or ("test" if tuple(known.files) == ("test",) else None)
        if split is None:
            raise UserError(f"{source.path}: its name does not tell its split; expected train or test in it")
        by_split.setdefault(split, []).append(source)
    counts, tested = {}, problems_in(without)
    left_out, aside = 0, {split: folder / f".{split}.jsonl.tmp" for split in by_split}
    try:
        for split, files in by_split.items():
            unwanted = tested if split == "train" else set()
            with naming(folder / f"{split}.jsonl", always=True):
                counts[split], gone = _write_rows(known.fields, files, aside[split], unwanted)
            left_out += gone
        index = {
            "name": name,
            "licence": known.licence,
            "repository": known.repository,
            "revision": known.revision,
            "sources": [source.record() for source in sources],
            "problems": counts,
            "compared_with": len(tested),
            "left_out": left_out,
        }
        with naming(folder / SOURCE, always=True):
            write_whole(unfinished, json.dumps(index, indent=1) + "\n")
        # Splits of other sources never stand side by side: what was there goes first.
        for old in (SOURCE, *(f"{split}.jsonl" for split in SPLITS)):
            (folder / old).unlink(missing_ok=True)
        for split, path in aside.items():
            path.replace(folder / f"{split}.jsonl")
        unfinished.replace(folder / SOURCE)
        sync_folder(folder)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    return index


_MORE = ("answer", "subject", "level", "source")  # fields that are kept where rows have them


def _write_rows(wanted: tuple[str, ...], files: list[Source], path: Path, unwanted: set[str]) -> tuple[int, int]:
    """Return how many rows were written, and how many were left out since their problem is among the `unwanted`."""
    count = left_out = 0
    with path.open("w", encoding="utf-8") as out:
        for source in files:
            for where, row in rows_of(source.path):
                kept = {name: field_of(row, name, where) for name in wanted}
                if unwanted and signature(kept[wanted[0]]) in unwanted:
                    left_out += 1
                    continue
                kept |= {name: row[name] for name in _MORE if name in row and name not in kept}
                out.write(json.dumps(kept, ensure_ascii=False) + "\n")
                count += 1
        out.flush()
        os.fsync(out.fileno())
    if not count:
        why = f"holds no problems but the {left_out:,} that are left out" if left_out else "holds no problems"
        raise UserError(f"{files[0].path}: {why}")
    return count, left_out
