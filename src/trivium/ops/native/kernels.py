"""Compile the kernels for this processor, once, and load them.

The library lies in the user's cache folder under a name made of the sources, the compiler and the processor, so that
another of any of them compiles anew. It uses the OpenMP threads that PyTorch brought: it names no OpenMP library of its
own, and a second one would fight for the processor.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("trivium")

SOURCES = ("kernels.c", "vectors.h", "attention.h", "pointwise.h")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fopenmp")
SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}


class KernelsMissingError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


@cache
def missing() -> str | None:
    """Return why the kernels cannot be had on this machine, or None; the first call compiles them (seconds)."""
    try:
        library()
    except KernelsMissingError as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """Return the loaded kernels; raise KernelsMissingError where there is no compiler or it fails."""
    if not sys.platform.startswith("linux"):
        raise KernelsMissingError("compiled on Linux alone")
    compiler = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise KernelsMissingError("no C compiler (gcc, cc or clang)")
    path = cache_folder() / f"kernels-{_key(compiler)}.so"
    if not path.exists():
        path = _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsMissingError(f"the kernels do not load: {error}") from None


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call kernel `name` for `dtype`; raise MemoryError when it found no memory for its buffers."""
    if getattr(library(), f"{name}_{SUFFIX[dtype]}")(*arguments):
        raise MemoryError(f"{name}: no memory for the buffers of its threads")


def cache_folder() -> Path:
    """Return the user's cache folder, or one that goes with this process where there is none to write in."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _passing_folder()
    return folder if os.access(folder, os.W_OK | os.X_OK) else _passing_folder()


@cache
def _passing_folder() -> Path:
    import atexit

    folder = tempfile.mkdtemp(prefix="trivium-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _key(compiler: str) -> str:
    """Return a hash of all that decides what the library holds."""
    found = hashlib.sha256()
    for source in SOURCES:
        found.update((Path(__file__).parent / source).read_bytes())
    real = Path(compiler).resolve()
    for part in (*FLAGS, str(real), str(real.stat().st_size), platform.machine(), _processor()):
        found.update(part.encode() + b"\0")
    return found.hexdigest()[:16]


def _processor() -> str:
    """Return what the processor can do, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def _compile(compiler: str, path: Path) -> Path:
    _log.info("compiling the kernels for this processor with %s, once, into %s", compiler, path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Two commands: linking with -fopenmp would bring a second OpenMP library.
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        source = Path(__file__).parent / SOURCES[0]
        for command in (
            [compiler, *FLAGS, "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = next(iter(done.stderr.strip().splitlines()), "without a word")
                raise KernelsMissingError(f"{compiler} failed: {said}")
        os.replace(linked, path)
    return path
