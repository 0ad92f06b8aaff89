"""Time the making of a corpus beside tiktoken alone: the same text and vocabulary, tokens compared before any timing.

Making a corpus goes from the files to the last shard on the disk; the other rows encode what is in memory already.
tiktoken has GPT-2's own pattern, in one thread and in batches of threads.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.bench.gates import WrongResult
from trivium.data.corpora import Source
from trivium.data.documents import documents_of
from trivium.data.prepare import prepare_text
from trivium.registry import UserError
from trivium.tasks.base import SPLITS
from trivium.tasks.byte_pairs import PATTERN, BytePairs, load_byte_pairs
from trivium.tasks.download import require_extra
from trivium.tasks.shards import Corpus
from trivium.train.environment import describe_environment


def bench_tokenise(
    sources: list[Source], tokenizer: str, *, key: str = "text", jobs: int = 1, repeats: int = 3
) -> dict[str, Any]:
    """Return {"benchmark", "unit", "documents", "bytes", "tokens", "jobs", "repeats", "rows", "environment"}.

    A row is {"row", "tokens_per_second": {"median", "each"}}; that of a corpus also has "seconds", those of reading the
    text, of tokenising (which the rate is of) and of the whole, each of the fastest repeat. Raises UserError for what
    cannot be read, and WrongResult when tokens differ from tiktoken's.
    """
    require_extra("tiktoken", "this benchmark")
    vocabulary = load_byte_pairs(tokenizer)
    texts = [text for source in sources for text in documents_of(source.path, key) if text]
    if not texts:
        raise UserError("--from: a text of 0 tokens; give some text")
    theirs = _tiktoken(vocabulary)
    tokens = check_tokens(vocabulary, theirs, texts)
    made: list[dict[str, Any]] = []

    def prepare() -> float:
        with tempfile.TemporaryDirectory(prefix="trivium-bench-") as folder:
            began = time.perf_counter()
            found = prepare_text("text", sources, Path(folder) / "text", tokenizer, key=key, jobs=jobs)
            seconds = {**found["seconds"], "whole": time.perf_counter() - began}
            if not made:
                _check_corpus(Path(folder) / "text", tokens, len(texts))
        made.append(seconds)
        return found["tokens_per_second"]

    rows: dict[str, Callable[[], float]] = {
        "trivium data prepare": prepare,
        "trivium, one thread in memory": lambda: _rate(
            lambda: [vocabulary.encode_ordinary(text) for text in texts], tokens
        ),
        "tiktoken, one thread in memory": lambda: _rate(
            lambda: [theirs.encode_to_numpy(text, disallowed_special=()) for text in texts], tokens
        ),
        f"tiktoken, batches of {jobs} threads in memory": lambda: _rate(
            lambda: theirs.encode_ordinary_batch(texts, num_threads=jobs), tokens
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):  # in turns, so that what else the machine does falls on all of them
        for name, run in rows.items():
            found[name].append(run())
    timed = [
        {"row": name, "tokens_per_second": {"median": statistics.median(each), "each": each}}
        for name, each in found.items()
    ]
    timed[0]["seconds"] = min(made, key=lambda seconds: seconds["tokenising"])
    return {
        "benchmark": "tokenise",
        "unit": "tokens per second",
        "documents": len(texts),
        "bytes": sum(len(text.encode("utf-8", "replace")) for text in texts),
        "tokens": tokens,
        "jobs": jobs,
        "repeats": repeats,
        "vocabulary": len(vocabulary),
        "tiktoken": version("tiktoken"),
        "rows": timed,
        "environment": describe_environment(torch.device("cpu")),
    }


def _tiktoken(vocabulary: BytePairs) -> Any:
    import tiktoken

    return tiktoken.Encoding(
        "theirs",
        pat_str=PATTERN,
        mergeable_ranks=dict(vocabulary.ids),
        special_tokens=dict(vocabulary.specials),
    )


def check_tokens(vocabulary: BytePairs, theirs: Any, texts: Sequence[str]) -> int:
    """Return the number of tokens of all texts; WrongResult where ours are not tiktoken's."""
    tokens = 0
    for number, text in enumerate(texts):
        ids = vocabulary.encode_ordinary(text)
        if not np.array_equal(ids, theirs.encode_to_numpy(text, disallowed_special=())):
            raise WrongResult(f"document {number + 1} has other tokens than tiktoken gives it")
        tokens += len(ids)
    return tokens


def _check_corpus(folder: Path, tokens: int, documents: int) -> None:
    corpus = Corpus(folder)
    made = sum(corpus.count(split, "tokens") - corpus.count(split, "documents") for split in SPLITS)
    # Where few documents are there, one is cut into three, and a piece at each cut too.
    if abs(made - tokens) > (0 if documents > 2 else 8):
        raise WrongResult(f"the corpus has {made:,} tokens, the texts {tokens:,}")


def _rate(run: Callable[[], Any], tokens: int) -> float:
    began = time.perf_counter()
    run()
    return tokens / (time.perf_counter() - began)
