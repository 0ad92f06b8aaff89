"""The corpora that `trivium data prepare` knows: where the hub has them, under which licence, and their checksums.

Files come from the Hugging Face hub at a pinned revision, or from a folder of the user's; none is part of Trivium.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trivium.data.documents import files_in, split_named
from trivium.registry import UserError
from trivium.tasks.download import hub_file, require_extra, unreachable

_log = logging.getLogger("trivium")


@dataclass(frozen=True)
class Known:
    """A corpus of the hub. `files` gives the file or files of each split, `fields` those that a row must have.

    `sums` are SHA-256 sums of published files that come from elsewhere too, by split.
    """

    repository: str
    revision: str
    licence: str
    files: Mapping[str, tuple[str, ...]]
    shape: Literal["problems", "articles"]
    fields: tuple[str, ...] = ()
    sums: Mapping[str, str] = field(default_factory=dict)


_GSM8K = {split: (f"main/{split}-00000-of-00001.parquet",) for split in ("train", "test")}
_NUMINA = {
    "train": tuple(f"data/train-{part:05d}-of-00005.parquet" for part in range(5)),
    "test": ("data/test-00000-of-00001.parquet",),
}


def _wikitext(name: str, parts: int) -> Mapping[str, tuple[str, ...]]:
    train = tuple(f"{name}/train-{part:05d}-of-{parts:05d}.parquet" for part in range(parts))
    return {"train": train} | {split: (f"{name}/{split}-00000-of-00001.parquet",) for split in ("validation", "test")}


_WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
KNOWN: dict[str, Known] = {
    "gsm8k": Known(
        "openai/gsm8k",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        "MIT",
        _GSM8K,
        "problems",
        ("question", "answer"),
        {
            "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        },
    ),
    "numinamath": Known(
        "AI-MO/NuminaMath-CoT",
        "9d8d210c9f6a36c8f3cd84045668c9b7800ef517",
        "Apache-2.0 for the collection; its problems are of many sources, among them MATH",
        _NUMINA,
        "problems",
        ("problem", "solution"),
    ),
    "math500": Known(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        "none stated; MATH, whose problems these are, is under a takedown notice: do not pass them on",
        {"test": ("test.jsonl",)},
        "problems",
        ("problem", "solution"),
        {"test": "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"},
    ),
    "wikitext103": Known(
        "Salesforce/wikitext",
        _WIKITEXT_REVISION,
        "CC BY-SA 3.0 and GFDL",
        _wikitext("wikitext-103-raw-v1", 2),
        "articles",
        ("text",),
    ),
    "wikitext2": Known(
        "Salesforce/wikitext",
        _WIKITEXT_REVISION,
        "CC BY-SA 3.0 and GFDL",
        _wikitext("wikitext-2-raw-v1", 1),
        "articles",
        ("text",),
    ),
}
NAMES = (*KNOWN, "text")


@dataclass(frozen=True)
class Source:
    """A file that a corpus is made from."""

    path: Path
    split: str | None
    bytes: int
    sha256: str

    def record(self) -> dict[str, Any]:
        """Return what corpus.json keeps; the name and no folder, which is that of one machine."""
        return {"file": self.path.name, "split": self.split, "bytes": self.bytes, "sha256": self.sha256}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits; UserError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def local_sources(place: Path) -> list[Source]:
    """Return the files of a file or folder that a user gave."""
    found = files_in(place)
    return [Source(path, split_named(path), path.stat().st_size, sha256_of(path)) for path in found]


def instead(name: str) -> str:
    """Say what a user without a network can do."""
    known = KNOWN[name]
    files = ", ".join(file for files in known.files.values() for file in files)
    return (
        f"without a network, place {files} of huggingface.co/datasets/{known.repository} (revision {known.revision}), "
        f"or JSON lines of the same fields, in a folder and give it: trivium data prepare {name} --from FOLDER"
    )


@dataclass(frozen=True)
class Published:
    """What the hub says of a file: its size, and its SHA-256, or git's name of it where it is a small file of git."""

    bytes: int
    sha256: str | None
    blob: str | None


def published(known: Known) -> dict[str, Published]:
    """Return what the hub says of the files at the pinned revision; nothing when it cannot be asked."""
    require_extra("huggingface_hub", f"{known.repository}: a download from the Hugging Face hub")
    from huggingface_hub import HfApi

    names = [file for files in known.files.values() for file in files]
    try:
        if (silent := unreachable()) is not None:
            raise ConnectionError(silent)
        found: list[Any] = HfApi().get_paths_info(known.repository, names, repo_type="dataset", revision=known.revision)
    except Exception as error:  # of the network or the hub: the files may still be in the cache
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _log.info("%s: the hub does not say what it has (%s)", known.repository, first)
        return {}
    return {
        each.path: Published(each.size, each.lfs.sha256 if each.lfs else None, getattr(each, "blob_id", None))
        for each in found
        if hasattr(each, "size")
    }


def hub_sources(name: str) -> list[Source]:
    """Return the files of a known corpus, downloaded from the hub and compared with what it says of them.

    Raises UserError when one cannot be had, or is not what the hub has at that revision.
    """
    known = KNOWN[name]
    told = published(known)
    for file, each in told.items():
        _log.info("%s: %s bytes, SHA-256 %s", file, f"{each.bytes:,}", each.sha256 or "not told")
    sources = []
    for split, files in known.files.items():
        for file in files:
            path = hub_file(known.repository, file, instead(name), kind="dataset", revision=known.revision)
            source = Source(path, split, path.stat().st_size, sha256_of(path))
            wanted = told.get(file)
            if wanted is None and split in known.sums and len(files) == 1 and path.suffix == ".jsonl":
                wanted = Published(source.bytes, known.sums[split], None)
            _compare(source, wanted, file)
            sources.append(source)
    return sources


def _compare(source: Source, wanted: Published | None, file: str) -> None:
    if wanted is None:
        _log.warning("%s: from the hub's cache, with nothing to compare it with", file)
        return
    again = f"remove {source.path} and run the command again"
    if source.bytes != wanted.bytes:
        raise UserError(f"{file}: the download has {source.bytes:,} bytes, the hub's file {wanted.bytes:,}; {again}")
    if wanted.sha256 is not None and source.sha256 != wanted.sha256:
        raise UserError(f"{file}: SHA-256 is {source.sha256}, the hub's is {wanted.sha256}; {again}")
    if wanted.sha256 is None and wanted.blob is not None and _git_blob(source.path) != wanted.blob:
        raise UserError(f"{file}: is not the file that the hub has at this revision (blob {wanted.blob}); {again}")


def _git_blob(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def say(name: str, sources: list[Source], where: str) -> list[str]:
    """Return the lines that are said before anything is made: files, sizes, checksums, licence."""
    known = KNOWN.get(name)
    lines = [f"{name}: from {where}"]
    for source in sources:
        told = f"  {source.path.name}  {source.bytes:,} bytes  SHA-256 {source.sha256}"
        wanted = known.sums.get(source.split or "") if known and source.path.suffix == ".jsonl" else None
        if wanted is not None:
            told += " (as published)" if wanted == source.sha256 else " (not the published file: taken as your own)"
        lines.append(told)
    lines.append(f"  licence: {known.licence if known else 'that of your own files'}")
    return lines
