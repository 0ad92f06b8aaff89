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

HEADERS = ("vectors", "attention", "step", "pointwise", "linear", "adamw", "norm", "memory", "simplicial")
SOURCES = ("kernels.c", *(f"{name}.h" for name in HEADERS))
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fwrapv", "-fPIC", "-fopenmp")
PATIENCE = 120.0  # seconds for the compiler, which needs 5
SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
# What each kernel takes: addresses, integers and doubles.
KINDS = {
    "attention_forward": "aaa",
    "attention_backward": "aaaa",
    "attention_step": "aaaaaaiiiiidi",
    "gelu_forward": "aaii",
    "gelu_backward": "aaaii",
    "linear_forward": "aaaaiiii",
    "linear_backward": "aaaaaaiiii",
    "feedforward_forward": "aaa",
    "feedforward_backward": "a" * 8,
    "norm_forward": "aaaaaaaiidi",
    "norm_backward": "aaaaaaaaiii",
    "memory_step": "aaaaaaaiiiiiii",
    "convolution_step": "aaaaiiii",
    "simplicial_step": "aaaaaaaiiiiiiiidi",
    "adamw": "aaaaaaaidddddai",
}
_TYPES = {"a": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


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
    try:
        name = f"kernels-{_key(compiler)}.so"
        path = cache_folder() / name
        # A home that cannot be written may still hold them.
        if not path.is_file():
            path = _compile(compiler, _writable(path.parent) / name)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsMissingError(f"the kernels do not load: {error}") from None


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call kernel `name` for `dtype` with the kinds of arguments that KINDS tells; an address may be None.

    Raises MemoryError when it found no memory for its buffers.
    """
    if _kernel(name, dtype)(*arguments):
        raise MemoryError(f"{name}: no memory for the buffers of its threads")


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    kernel = getattr(library(), f"{name}_{SUFFIX[dtype]}")
    kernel.argtypes = [_TYPES[kind] for kind in KINDS[name]]
    return kernel


def once(backward: str, owner: torch.library.Library) -> None:
    """Let the gradient of operator `backward` raise: PyTorch would take it for 0 with no more than a warning."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{backward} has no gradient of its own; backend='torch' has second gradients")

    torch.library.register_autograd(backward, refuse, lib=owner)


def cache_folder() -> Path:
    """Return the folder of the user's cache that is Trivium's; a passing one for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium"
    except RuntimeError:
        return _passing_folder()


def _writable(folder: Path) -> Path:
    """Return the folder, made if need be, or one that goes with this process if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return _passing_folder()
    return folder


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
    about = real.stat()
    # A home may be shared by machines of other processors and C libraries.
    machine = (platform.machine(), *platform.libc_ver(), _processor())
    for part in (*FLAGS, str(real), str(about.st_size), str(about.st_mtime_ns), *machine):
        found.update(part.encode() + b"\0")
    return found.hexdigest()[:16]


def _processor() -> str:
    """Return what the processor can do, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "cpu part", "features", "cpu", "isa")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip().lower() in wanted}))


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
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=PATIENCE,
                )
            except subprocess.TimeoutExpired:
                raise KernelsMissingError(f"{compiler} did not finish in {PATIENCE} s") from None
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["without a word"]
                said = next((line for line in lines if "error" in line), lines[0])
                raise KernelsMissingError(f"{compiler} failed: {said}")
        os.replace(linked, path)
    return path
