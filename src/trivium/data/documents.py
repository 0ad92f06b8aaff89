"""Documents and rows from files: plain text, JSON lines, Parquet, each also gzipped where that is usual.

Every error names the file, and the line or row, that it is about.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from trivium.registry import UserError
from trivium.tasks.download import require_extra

WIKITEXT_ENDINGS = (".tokens", ".raw")
TEXT_ENDINGS = (".txt", ".md", *WIKITEXT_ENDINGS)
ROW_ENDINGS = (".jsonl", ".ndjson")
UNFINISHED = ".source.json.tmp"  # stands in a folder of problems while its files are put in their places
PARQUET = ".parquet"
KNOWN = (*TEXT_ENDINGS, *ROW_ENDINGS, PARQUET)
_SPLIT = re.compile(r"(?:^|[._-])(train|valid|validation|val|dev|test)(?=[._-]|$)", re.IGNORECASE)
_HALF = re.compile("[\ud800-\udfff]")
_SPLITS = {"valid": "validation", "val": "validation", "dev": "validation"}
# An article of WikiText begins with a line such as " = Robert Boulter = "; sections have more than one sign.
_TITLE = re.compile(r"^ ?= [^=].*[^=] = ?$|^ ?= [^=] = ?$")


def ending(path: Path) -> str:
    """Return what kind of file `path` is by its name: its ending, that of gzip taken off."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def split_named(path: Path) -> str | None:
    """Return the split that a file's name tells: train, validation or test; None if it tells none."""
    found = _SPLIT.search(path.name)
    return None if found is None else _SPLITS.get(found[1].lower(), found[1].lower())


def files_in(place: Path) -> list[Path]:
    """Return `place` if it is a file of a known kind, or all such files in the folder, by name.

    Raises UserError for none, and for a folder of problems of which some may be missing.
    """
    kinds = ", ".join(KNOWN)
    if place.is_file():
        if ending(place) not in KNOWN:
            raise UserError(f"{place}: of no kind that is read; allowed: {kinds}, the text ones also as .gz")
        return [place]
    if not place.is_dir():
        raise UserError(f"{place}: no such file or folder")
    every = [path for path in place.rglob("*") if path.is_file()]
    begun = next((path.parent for path in every if path.name == UNFINISHED), None)
    if begun is not None:
        raise UserError(f"{begun}: was not prepared to the end; run its command again")
    found = sorted(path for path in every if ending(path) in KNOWN)
    if not found:
        raise UserError(f"{place}: holds no text; expected files that end in {kinds}")
    return found


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def _failed(where: Path | str, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        why = f"cut short or damaged ({why})"
    return UserError(f"{where}: cannot be read: {why}")


_ERRORS = (OSError, EOFError, zlib.error)


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, row) of a file of JSON lines or a Parquet file."""
    if ending(path) == PARQUET:
        yield from _parquet_rows(path)
        return
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON ({error}); the file may be cut short") from None
                if not isinstance(row, dict):
                    raise UserError(f"{where}: not an object of named fields")
                yield where, row
    except _ERRORS as error:
        raise _failed(path, error) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    require_extra("pyarrow", f"{path}: a Parquet file")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (OSError, pyarrow.ArrowException) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: cut short or no Parquet file ({first})") from None


def field_of(row: dict[str, Any], name: str, where: str) -> str:
    """Return the text `name` of a row; UserError when it is missing or no text."""
    value = row.get(name)
    if not isinstance(value, str):
        what = "missing" if name not in row else "not text"
        raise UserError(f"{where}: {name} is {what}; it has {', '.join(map(str, row)) or 'nothing'}")
    if _HALF.search(value):
        raise UserError(f"{where}: {name} holds half a surrogate pair, which no text can hold")
    return value


def text_of(path: Path) -> str:
    """Return the whole text of a file of plain text."""
    try:
        with _open(path) as file:
            content = file.read()
    except _ERRORS as error:
        raise _failed(path, error) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason})") from None


def documents_of(path: Path, field: str = "text") -> Iterator[str]:
    """Yield the documents of a file: the whole of a plain text, or `field` of each row."""
    if ending(path) in TEXT_ENDINGS:
        yield text_of(path)
        return
    for where, row in rows_of(path):
        yield field_of(row, field, where)


def articles_of(path: Path) -> Iterator[str]:
    """Yield the articles of a WikiText file, as plain text or in the rows of its Parquet files."""
    if ending(path) in TEXT_ENDINGS:
        lines = iter(text_of(path).splitlines(keepends=True))
    else:
        # A blank line, " \n" in the text files, is an empty row.
        lines = (field_of(row, "text", where) or " \n" for where, row in rows_of(path))
    article: list[str] = []
    blank = True
    for line in lines:
        if blank and _TITLE.match(line.rstrip("\n")) and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line)
        blank = not line.strip()
    if article:
        yield "".join(article)


def count_wikitext_words(text: str) -> int:
    """Return the words of a WikiText article as its authors count them: each line's end is one."""
    return len(text.split()) + text.count("\n")
