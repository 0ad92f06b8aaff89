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


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The kernels as every other test has them: compiled in the user's own cache, where they were not yet."""
    if kernels.missing() is not None:
        pytest.skip(str(kernels.missing()))
    return Path(kernels.library()._name)


def test_they_are_compiled_once_and_then_found(
    compiled: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    # To compile them a second time takes seconds: this compiler has its result at hand and counts what it is asked for.
    called = fresh / "called"
    script = f'echo "$*" >> {called}; while [ "$1" != -o ]; do shift; done; cp {compiled} "$2"'
    monkeypatch.setenv("PATH", compiler(fresh / "bin", script) + os.pathsep + "/bin" + os.pathsep + "/usr/bin")
    for told in (True, False):
        kernels.library.cache_clear()
        caplog.clear()  # an earlier test may have had the first compilation told
        with caplog.at_level(logging.INFO, "trivium"):
            assert kernels.library()._name == str(*(fresh / "cache" / "trivium").iterdir())
        assert ("compiling" in caplog.text) == told
        assert len(called.read_text().splitlines()) == 2, "one compiles, one links"


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
    folder = kernels._writable(kernels.cache_folder())
    assert folder.is_dir()
    assert not folder.is_relative_to(fresh)


def test_a_user_without_a_home_gets_a_passing_folder(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert kernels.cache_folder() == kernels._passing_folder()


def test_a_compiler_that_hangs_is_given_up(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "PATIENCE", 0.2)
    monkeypatch.setenv("PATH", compiler(fresh / "bin", "exec sleep 20") + os.pathsep + "/bin" + os.pathsep + "/usr/bin")
    assert "did not finish in 0.2 s" in str(kernels.missing())


def test_a_machine_that_does_not_tell_its_processor_is_a_reason_too(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    def untold() -> str:
        raise PermissionError("/proc/cpuinfo")

    monkeypatch.setattr(kernels, "_processor", untold)
    monkeypatch.setenv("PATH", compiler(fresh / "bin", "exit 1"))
    assert "/proc/cpuinfo" in str(kernels.missing())
