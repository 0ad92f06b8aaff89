"""The kernels in C are compiled once a processor, and where they cannot be, the reason is told."""

import logging
import os
from pathlib import Path

import pytest

from trivium.ops import dispatch
from trivium.ops.native import kernels


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty cache folder, and nothing loaded; what was loaded before stays loaded for the others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels.library.cache_clear()
    kernels.missing.cache_clear()
    yield tmp_path
    kernels.library.cache_clear()
    kernels.missing.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """Put a program named gcc, alone, into `folder`; return the search path."""
    folder.mkdir()
    program = folder / "gcc"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(folder)


def test_they_are_compiled_once_and_then_found(fresh: Path, caplog: pytest.LogCaptureFixture):
    if kernels.missing() is not None:
        pytest.skip(str(kernels.missing()))
    (library,) = (fresh / "cache" / "trivium").iterdir()
    written = library.stat().st_mtime_ns
    kernels.library.cache_clear()
    with caplog.at_level(logging.INFO, "trivium"):
        kernels.library()
    assert "compiling" not in caplog.text
    assert library.stat().st_mtime_ns == written


def test_without_a_compiler_the_reason_is_told_and_pytorch_serves(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(fresh))
    assert kernels.missing() == "no C compiler (gcc, cc or clang)"
    assert dispatch._decide("gelu", "auto", "cpu", {}) == (
        "torch",
        "PyTorch's own; native is missing: no C compiler (gcc, cc or clang)",
    )


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", compiler(fresh / "bin", "echo 'no such flag' >&2; exit 1"))
    assert "gcc failed: no such flag" in str(kernels.missing())
    assert list((fresh / "cache" / "trivium").iterdir()) == []


def test_a_library_that_does_not_load_is_a_reason_too(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    script = 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"'
    monkeypatch.setenv("PATH", compiler(fresh / "bin", script) + os.pathsep + "/bin" + os.pathsep + "/usr/bin")
    assert "do not load" in str(kernels.missing())


def test_a_folder_that_cannot_be_written_is_replaced_by_a_passing_one(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert kernels.cache_folder().is_dir()
    assert not str(kernels.cache_folder()).startswith(str(fresh))
