"""Perplexity of text with every token scored: the first of each window too, and the first of all from the end symbol.

Two forms. `windowed`: windows follow one another, each token is read once, and what is early in a window is told by few
tokens before it. `strided`: windows overlap, only their last `stride` tokens are scored, so that each is told by at
least window - stride tokens (where there are so many); the smaller the stride, the lower and the dearer.

Shapes: B windows, T tokens of the longest, N scored tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from trivium.config import UserError
from trivium.data.documents import (
    WIKITEXT_ENDINGS,
    articles_of,
    count_wikitext_words,
    documents_of,
    ending,
    files_in,
)
from trivium.evaluate.teacher import LOGITS
from trivium.generate.engine import evaluating, longest_input
from trivium.generate.sampling import device_of
from trivium.model.base import LanguageModel
from trivium.tasks.base import Task
from trivium.tasks.byte_pairs import BytePairs
from trivium.tasks.shards import INDEX, Corpus


@dataclass(frozen=True)
class Window:
    """Tokens that are read in one pass: `ids` without the last, of whose targets the last `scored` count for `text`."""

    text: int
    ids: np.ndarray
    scored: int


def windows(texts: Iterable[np.ndarray], window: int, stride: int) -> Iterator[Window]:
    """Yield the windows of each text, an array of ids of which the first is given and every other is scored once.

    `window` counts the tokens that a pass reads, and `stride` those that it scores; all of the first of a text.
    """
    for number, ids in enumerate(texts):
        total = len(ids) - 1
        end = done = 0
        while done < total:
            end = min(total, end + (stride if end else window))
            yield Window(number, ids[max(0, end - window) : end + 1], end - done)
            done = end


def nats(
    model: LanguageModel,
    texts: Iterable[np.ndarray],
    *,
    window: int | None = None,
    stride: int | None = None,
    last: Sequence[int] | None = None,
) -> Iterator[tuple[int, float, int, bool]]:
    """Yield (number of a text, nats of its scored tokens, how many, whether each was the most probable) by windows.

    Texts are int64 ids of which the first is given. `window` defaults to what the model reads, `stride` to `window`.
    With `last`, as many numbers as there are texts, each is read in one pass and only its last so many tokens count.
    Raises UserError when the model cannot read so much, or the stride is not of 1 to `window` tokens.
    """
    room = longest_input(model)
    window = window or room
    stride = window if stride is None else stride
    if not 1 <= window <= room:
        raise UserError(f"window: the model reads at most {room} tokens, got {window}")
    if not 1 <= stride <= window:
        raise UserError(f"stride: expected 1 to {window} tokens, the window's, got {stride}")
    if model.decoding.shift:
        raise UserError("perplexity is of the next token, and this model was trained on one further ahead")
    rows = max(1, LOGITS // (window * model.context.vocab_size))
    waiting: list[Window] = []
    with evaluating(model), torch.inference_mode():
        if last is None:
            reading = windows(texts, window, stride)
        else:
            reading = (Window(n, ids, count) for n, (ids, count) in enumerate(zip(texts, last, strict=True)))
        for each in reading:
            waiting.append(each)
            if len(waiting) == rows:
                yield from _score(model, waiting)
                waiting = []
        if waiting:
            yield from _score(model, waiting)


def _score(model: LanguageModel, read: list[Window]) -> list[tuple[int, float, int, bool]]:
    device = device_of(model)
    longest = max(len(each.ids) for each in read) - 1
    tokens_BT = np.zeros((len(read), longest), dtype=np.int64)
    scored_BT = np.zeros((len(read), longest), dtype=bool)
    targets_BT = np.zeros((len(read), longest), dtype=np.int64)
    for row, each in enumerate(read):
        length = len(each.ids) - 1
        # What stands behind a row is read after it, and changes nothing before.
        tokens_BT[row, :length] = each.ids[:-1]
        targets_BT[row, :length] = each.ids[1:]
        scored_BT[row, length - each.scored : length] = True
    wanted_N = torch.from_numpy(np.flatnonzero(scored_BT)).to(device)
    logits_NV, _ = model(torch.from_numpy(tokens_BT).to(device), wanted_N=wanted_N)
    targets_N = torch.from_numpy(targets_BT[scored_BT]).to(device)
    losses_N = cross_entropy(logits_NV.float(), targets_N, reduction="none").double().cpu()
    likely_N = (logits_NV.argmax(-1) == targets_N).cpu()
    found, place = [], 0
    for each in read:
        here = slice(place, place + each.scored)
        found.append((each.text, float(losses_N[here].sum()), each.scored, bool(likely_N[here].all())))
        place += each.scored
    return found


def perplexity(
    model: LanguageModel,
    texts: Iterable[np.ndarray],
    end_id: int,
    *,
    window: int | None = None,
    stride: int | None = None,
    words: int = 0,
    num_bytes: int = 0,
) -> dict[str, Any]:
    """Return the perplexity of `texts`, each an array of its tokens, read alone and from the end symbol on.

    Returns {"form", "window", "stride", "texts", "tokens", "nats", "loss" (nats a token), "per_token", "words",
    "per_word", "bytes", "bits_per_byte"}; what the corpus does not count, given as 0, is None. The end symbol behind a
    text is no part of it. Raises UserError for texts of 0 tokens, and as `nats` does.
    """
    window = window or longest_input(model)
    stride = stride or window
    counts = {"texts": 0}

    def given() -> Iterator[np.ndarray]:
        for ids in texts:
            counts["texts"] += 1
            yield np.concatenate(([end_id], ids)).astype(np.int64)

    total, tokens = 0.0, 0
    for _, loss, count, _ in nats(model, given(), window=window, stride=stride):
        total, tokens = total + loss, tokens + count
    if tokens == 0:
        raise UserError("perplexity: a text of 0 tokens; there is nothing to score")
    return {
        "form": "windowed" if stride == window else "strided",
        "window": window,
        "stride": stride,
        **counts,
        "tokens": tokens,
        "nats": total,
        "loss": total / tokens,
        "per_token": _exp(total / tokens),
        "words": words or None,
        "per_word": _exp(total / words) if words else None,
        "bytes": num_bytes or None,
        "bits_per_byte": total / num_bytes / math.log(2) if num_bytes else None,
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def score_text(
    model: LanguageModel, task: Task, place: Path, split: str, window: int | None = None, stride: int | None = None
) -> dict[str, Any]:
    """Return the perplexity of a corpus's split, or of the text files at `place`, see `perplexity`.

    Words are counted in WikiText alone, as its authors do. Raises UserError for a corpus of another vocabulary than the
    model's, and for what cannot be read.
    """
    if (place / INDEX).is_file():
        corpus = Corpus(place)
        if corpus.vocabulary != task.alphabet:
            raise UserError(
                f"{place}: its tokens are of a vocabulary of {len(corpus.vocabulary)}, the model's has "
                f"{len(task.alphabet)} and is another; prepare the corpus with the model's tokenizer"
            )
        corpus.size(split)
        words, num_bytes = corpus.count(split, "words"), corpus.count(split, "bytes")
        texts: Iterable[np.ndarray] = corpus.documents(split)
    else:
        counts = _Counts()
        texts = list(_encoded(place, task, counts))
        words, num_bytes, split = counts.words, counts.bytes, "files"
    found = perplexity(
        model, texts, task.alphabet.end_id, window=window, stride=stride, words=words, num_bytes=num_bytes
    )
    return {"text": str(place), "split": split, **found}


@dataclass
class _Counts:
    words: int = 0
    bytes: int = 0


def _encoded(place: Path, task: Task, counts: _Counts) -> Iterator[np.ndarray]:
    for path in files_in(place):
        articles = ending(path) in WIKITEXT_ENDINGS
        for text in articles_of(path) if articles else documents_of(path):
            counts.bytes += len(text.encode("utf-8", "replace"))
            counts.words += count_wikitext_words(text) if articles else 0
            if isinstance(task.alphabet, BytePairs):
                yield task.alphabet.encode_ordinary(text)
            else:
                try:
                    yield np.array(task.alphabet.encode(text), dtype=np.int64)
                except UserError as error:
                    first = str(error).partition(" at place ")[0]
                    raise UserError(f"{path}: {first} is not in the model's alphabet") from None
