"""The front door: help, the version, and how errors end."""

import re

import pytest

from tests.commands.line import run
from trivium import cli
from trivium.registry import UserError


def test_help_lists_every_command_with_a_line(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name, (_, line) in cli.COMMANDS.items():
        assert f"{name} " in out
        assert line in out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself(capsys, name):
    status, out, err = run(capsys, *name.split(), "--help")
    assert (status, err) == (0, "")
    assert f"usage: trivium {name}" in out
    words = " ".join(out.split())
    assert not re.search(r"\(default: [^()]*\)\. \(default: (None)?\)", words), "a default is told once"


def test_a_command_of_two_words_is_explained_by_its_first(capsys):
    status, out, _ = run(capsys, "data", "--help")
    assert status == 0
    assert "trivium data show" in out
    assert "trivium data write" in out


def test_the_version_is_printed(capsys):
    assert run(capsys, "--version")[:2] == (0, "trivium 0.1.0\n")


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (UserError("x: wrong"), 2, ["trivium: x: wrong"]),
        (UserError("one\ntwo\nthree"), 2, ["trivium: one", "two"]),
        (KeyboardInterrupt(), 1, ["trivium: interrupted"]),
        (KeyboardInterrupt("the same command continues"), 1, ["trivium: the same command continues"]),
        (PermissionError(13, "Permission denied", "/x"), 2, ["trivium: /x: permission denied"]),
        (NotADirectoryError(20, "Not a directory", "/x/y"), 2, ["trivium: /x/y: not a directory"]),
        (
            OSError(28, "No space left on device", "/x"),
            1,
            ["trivium: /x: the disk is full; what was written before is kept"],
        ),
        (
            OSError(27, "File too large", "/x"),
            1,
            ["trivium: /x: the file is larger than this process may write; what was written before is kept"],
        ),
        (OSError(30, "Read-only file system", "/x"), 2, ["trivium: /x: the file system is read-only"]),
    ],
)
def test_foreseen_failures_are_worded_and_have_their_exit_status(capsys, monkeypatch, error, status, lines):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "run", fail)
    outcome = run(capsys, "anything")
    assert (outcome[0], outcome[2].splitlines()) == (status, lines)


def test_a_bug_shows_its_traceback_and_exits_with_1(capsys, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda arguments: 1 / 0)
    status, _, err = run(capsys, "anything")
    assert status == 1
    assert "ZeroDivisionError" in err


def test_an_interrupt_while_libraries_are_imported_ends_at_once_and_leaves_the_signal_as_it_was(warm):
    code = """
import importlib, os, signal, sys, time
from trivium import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    cli.main(["doctor", "--help"])
except SystemExit:
    pass
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
def importing(name):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except BaseException:
        os.abort()  # as torch does when an exception comes in the middle of its import
importlib.import_module = importing
sys.exit(cli.main(["doctor"]))
"""
    process = warm.start(code)
    assert (process.wait(), process.err) == (1, "trivium: interrupted\n")
