"""trivium data prepare and trivium data tokenizer: from files, or the hub, to what tasks read."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from trivium.commands.console import announce
from trivium.commands.flags import parse
from trivium.config import UserError
from trivium.data.corpora import KNOWN, hub_sources, local_sources, say
from trivium.data.prepare import Progress as Counts
from trivium.data.prepare import prepare_problems, prepare_text
from trivium.data.tokenise import processors
from trivium.data.train_tokenizer import train_tokenizer

CHARACTERS = "characters"


@dataclass(frozen=True)
class PrepareOptions:
    name: tyro.conf.Positional[Literal["gsm8k", "numinamath", "math500", "wikitext103", "wikitext2", "text"]]
    """Corpus: text is any text of your own, given with --from; the others come from the hub without it."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """File, or folder of files, to make it from: .txt .md .jsonl .parquet, the text ones also gzipped."""
    out: Path | None = None
    """Folder to write (default: data/NAME)."""
    tokenizer: str = "gpt2"
    """Vocabulary of a text: a folder with a tokenizer's files, a hub id such as gpt2, or characters."""
    field: str = "text"
    """Field of JSON or Parquet rows that is the text."""
    held_out: float = 0.01
    """Share of a text for validation, and as much for test, where no file's name tells its split."""
    without: tuple[Path, ...] | None = None
    """Files or folders of test problems: training problems that are among them are left out and counted (default: for
    numinamath, the math500 beside it if that is prepared; none: --without alone)."""
    jobs: int | None = None
    """Processes that tokenise (default: one for each processor)."""
    json: bool = False
    """Print what was made as JSON on standard output."""


def prepare(arguments: Sequence[str]) -> None:
    """Say what a corpus is made from and under which licence, make it, and say how a recipe reads it."""
    options = parse(PrepareOptions, arguments, "trivium data prepare", "Make a corpus, or problems, that tasks read.")
    jobs = processors() if options.jobs is None else options.jobs
    if jobs < 1:
        raise UserError(f"--jobs: expected 1 or more processes, got {jobs}")
    name, known = options.name, KNOWN.get(options.name)
    folder = options.out or Path("data") / name
    if options.without is not None and (known is None or known.shape != "problems"):
        raise UserError(f"--without: is of problems, {name} is a text")
    announce()
    if options.from_ is not None:
        sources, where = local_sources(options.from_), str(options.from_)
    elif known is None:
        raise UserError("--from: missing; give the file or folder that holds your text")
    else:
        sources, where = hub_sources(name), f"huggingface.co/datasets/{known.repository} at {known.revision}"
    for line in say(name, sources, where):
        print(line, file=sys.stderr)
    if known is not None and known.shape == "problems":
        made = prepare_problems(name, sources, folder, without=_tests(options, folder))
    else:
        tokenizer = None if options.tokenizer == CHARACTERS else options.tokenizer
        with _progress(name) as counts:
            made = prepare_text(
                name,
                sources,
                folder,
                tokenizer,
                key=options.field,
                held_out=options.held_out,
                jobs=jobs,
                progress=counts,
            )
    if options.json:
        print(json.dumps({key: value for key, value in made.items() if key not in ("alphabet", "splits")}, indent=1))
    else:
        _tell(folder, made)


def _tests(options: PrepareOptions, folder: Path) -> tuple[Path, ...]:
    """Return where the problems stand that must not be trained on; say so where nobody knows."""
    if options.without is not None or options.name != "numinamath":
        return options.without or ()
    beside = folder.parent / "math500" / "test.jsonl"
    if beside.is_file():
        return (beside,)
    print(
        f"  not compared with MATH-500, whose problems it may have: {beside} is not there; prepare math500 first, or "
        "give its file as --without",
        file=sys.stderr,
    )
    return ()


@contextmanager
def _progress(name: str) -> Iterator[Counts]:
    """Show a bar on standard error with the rate of the tokens that are made."""
    columns = (
        TextColumn(name),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None, tokens=0, rate="")

        def show(now: Counts) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{now.tokens / elapsed / 1e6:.1f} M/s" if now.tokens and elapsed else ""
            bar.update(task, total=now.total, completed=now.done, tokens=now.tokens + now.kept, rate=rate)

        yield Counts(show=show)


def _tell(folder: Path, made: dict[str, Any]) -> None:
    if "problems" in made:
        for split, count in made["problems"].items():
            print(f"{folder / f'{split}.jsonl'}: {count:,} problems")
        if made["compared_with"]:
            print(f"left out for training: {made['left_out']:,} that are among {made['compared_with']:,} test problems")
        return
    for split, tokens in made["tokens"].items():
        if tokens:
            print(f"{split}: {tokens:,} tokens, {made['documents'][split]:,} documents")
    if made["kept"]:
        print(f"{made['kept']:,} of the tokens were there already")
    if made["tokens_per_second"]:
        print(f"{made['tokens_per_second'] / 1e6:.2f} M tokens/s in {made['jobs']} processes")
    print(f"in a recipe:  task: {{kind: text, corpus: {folder}}}")


@dataclass(frozen=True)
class TokenizerOptions:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files, or folders of files, of text to train on."""
    size: int
    """Tokens of the vocabulary: 256 bytes, the end symbol, and the pairs that are learned."""
    out: Path = Path("tokenizer")
    """Folder to write."""
    field: str = "text"
    """Field of JSON or Parquet rows that is the text."""


def tokenizer(arguments: Sequence[str]) -> None:
    """Train byte pairs and say how they are used."""
    options = parse(
        TokenizerOptions, arguments, "trivium data tokenizer", "Train a byte-pair vocabulary on your own text."
    )
    announce()
    vocabulary = train_tokenizer(options.files, options.size, options.out, key=options.field)
    print(f"{options.out}: {len(vocabulary):,} tokens")
    print(f"in use:  trivium data prepare text --from FOLDER --tokenizer {options.out}")
