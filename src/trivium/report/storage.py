"""Files that are either whole or not there: written aside, forced to the disk, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trivium.registry import UserError


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write `content` to `path` and force it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path, *, always: bool = False) -> Iterator[None]:
    """Let an OSError that names no file, as one of a full disk does not, name `path`; with `always`, any OSError."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not always:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader finds the file before or the file after, never a part.

    Raises OSError, which names `path` and not the file aside, when it cannot; the file before is then still there.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path, always=True):
            write_synced(aside, content.encode() if isinstance(content, str) else content)
            aside.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def make_folders(folder: Path, given: str | None = None) -> None:
    """Make `folder`, for what the user has `given`, and those above it that are missing.

    Raises UserError for a place where no folder can be, as /proc is, and OSError for one that may not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise UserError(f"{given or folder}: no folder can be made at {error.filename}") from None


def check_figure(path: Path | None) -> None:
    """Raise UserError for the file of a figure, if one is given, whose name ends in another format than are drawn."""
    if path is not None and path.suffix not in (".svg", ".png"):
        raise UserError(f"--figure: {path.name}: give a name that ends in .svg or .png")


def reserve(out: Path | None) -> None:
    """Find out before minutes of timing that `out` cannot be written; what it holds stays until then.

    Errors are those of `make_folders`.
    """
    if out is not None:
        make_folders(out.parent, f"--out {out}")
        new = not out.exists()
        out.open("a").close()
        if new:  # a benchmark that fails leaves no empty file of results
            out.unlink()
