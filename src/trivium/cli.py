"""The command line: one table of commands, each imported only when it is asked for."""

import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trivium import __version__
from trivium.commands import fail
from trivium.registry import UserError, nearest

# name -> (where its function lives, one line of help). The function takes the arguments behind the name and
# prints; what it returns, if anything, is the exit status.
COMMANDS = {
    "train": ("trivium.commands.train:train", "train the model of a recipe, or one of its variants"),
    "compare": (
        "trivium.commands.compare:compare",
        "train a recipe's variants at matched size and report which learned most",
    ),
    "eval": ("trivium.commands.eval:evaluate", "score a trained run on problems that it never saw, or on your file"),
    "chat": ("trivium.commands.chat:chat", "give a trained run problems of your own and watch its steps"),
    "data show": ("trivium.commands.data:show", "print examples with their tokens, positions and what is scored"),
    "data write": ("trivium.commands.data:write", "write a recipe's problems to JSONL files"),
    "data prepare": ("trivium.commands.prepare:prepare", "make a corpus or a file of problems that tasks read"),
    "data tokenizer": ("trivium.commands.prepare:tokenizer", "train byte pairs on your own text"),
    "report": ("trivium.commands.report:report", "draw report.html again from run or study folders"),
    "bench train": ("trivium.commands.bench:train", "time our training step beside transformers' Trainer"),
    "bench generate": (
        "trivium.commands.generate:generate",
        "time our generation beside transformers' on the same weights",
    ),
    "bench ops": ("trivium.commands.ops:ops", "time an operator's backends, forward and backward, and their memory"),
    "bench latency": (
        "trivium.commands.latency:latency",
        "time a generated token against its position, with the bytes of state",
    ),
    "bench tokenise": ("trivium.commands.tokenise:tokenise", "time the making of a corpus beside tiktoken alone"),
    "export": ("trivium.commands.export:export", "copy a run's model as a folder that trivium.load reads"),
    "doctor": ("trivium.commands.doctor:doctor", "say what this machine, its libraries and operators can do"),
}

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write",
}


def help_text() -> str:
    """Return the overview that `trivium --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [
        f"trivium {__version__}: a laboratory for language models that reason from few tokens",
        "",
        "usage: trivium COMMAND [arguments]     (trivium COMMAND --help says more)",
        "",
        *(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()),
    ]
    return "\n".join(lines)


def resolve(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split `arguments` into the command's name (one or two words) and the rest; UserError if there is none."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if len(arguments) >= words and name in COMMANDS:
            return name, list(arguments[words:])
    group = [name for name in COMMANDS if name.split()[0] == arguments[0]]
    if group:
        given = f"{arguments[0]} {arguments[1]}" if len(arguments) > 1 else arguments[0]
        raise UserError(f"unknown command {given!r}; {nearest(given, group)}")
    raise UserError(f"unknown command {arguments[0]!r}; {nearest(arguments[0], list(COMMANDS))}")


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; exceptions pass through."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"trivium {__version__}")
        return 0
    if len(arguments) == 2 and arguments[1] in ("-h", "--help") and arguments[0] not in COMMANDS:
        group = {name: line for name, (_, line) in COMMANDS.items() if name.split()[0] == arguments[0]}
        if group:
            print("\n".join(f"  trivium {name:<12}  {line}" for name, line in group.items()))
            return 0
    name, rest = resolve(arguments)
    module, function = COMMANDS[name][0].split(":")
    with _ending_at_once():
        loaded = importlib.import_module(module)
    return getattr(loaded, function)(rest) or 0


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end a process that is still importing: an exception in the middle of torch's import aborts it."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def end(number: int, frame: object) -> None:
        os.write(2, b"trivium: interrupted\n")
        os._exit(1)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: 0 done, 2 the user's input was wrong, 1 anything else."""
    try:
        status = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        return fail(str(error), 2)
    except BrokenPipeError:
        # The reader of our output left (`trivium data show | head`): the interpreter must not flush into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        return fail(str(error) or "interrupted")
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        return fail(f"{error.filename}: {(error.strerror or 'cannot be used').lower()}", 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.EROFS:
            return fail(f"{where}the file system is read-only", 2)
        if error.errno in FULL:
            return fail(f"{where}{FULL[error.errno]}; what was written before is kept")
        traceback.print_exc()
    except Exception:
        traceback.print_exc()
    return 1


if __name__ == "__main__":
    sys.exit(main())
