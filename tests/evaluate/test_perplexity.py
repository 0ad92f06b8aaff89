"""Perplexity: every token is scored once, by windows and by strides, per token, word and byte."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from trivium.config import UserError, from_dict
from trivium.data.corpora import local_sources
from trivium.data.prepare import prepare_text
from trivium.evaluate.perplexity import nats, perplexity, score_text, windows
from trivium.model.base import ModelConfig
from trivium.model.context import model_context
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.text import TextConfig

TEXT = " \n = One = \n \n Words of one . \n \n = Two = \n \n More words , 12 of them . \n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.tokens").write_text(TEXT, encoding="utf-8")
    prepare_text("wikitext2", local_sources(folder), folder / "made", None)
    return folder / "made"


@pytest.fixture(scope="module")
def made(corpus: Path):
    task = TextConfig(corpus, length=16).build()
    config = from_dict(ModelConfig, {"layers": "attention*1", "width": 16, "heads": 2, "positions": "rotary"}, "model")
    torch.manual_seed(0)
    model = config.build(model_context(task, config)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from uniform, so that a mistake shows
    return model, task


@pytest.mark.parametrize("length", [1, 2, 7, 16, 17, 40])
@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 4), (7, 1), (1, 1), (40, 40)])
def test_every_token_is_scored_once_the_first_of_all_too(length: int, window: int, stride: int):
    ids = np.arange(length + 1)
    scored: list[int] = []
    for each in windows([ids], window, stride):
        assert len(each.ids) - 1 <= window
        scored += each.ids[len(each.ids) - each.scored :].tolist()
    assert scored == list(range(1, length + 1))


def test_a_perplexity_is_that_of_plain_passes(made):
    model, task = made
    ids = np.random.default_rng(0).integers(0, len(task.alphabet), 37)
    whole = [task.alphabet.end_id, *ids.tolist()]

    def loss(place: int, begin: int) -> float:
        logits_1TV, _ = model(torch.tensor([whole[begin:place]]))
        return float(cross_entropy(logits_1TV[0, -1], torch.tensor(whole[place])))

    with torch.no_grad():
        # Windows end at 16, 32 and 37; the last reads as much as it can.
        windowed = sum(loss(place, (place - 1) // 16 * 16 if place <= 32 else 21) for place in range(1, 38))
        strided = sum(loss(place, 0 if place <= 16 else min((place - 17) // 4 * 4 + 4, 21)) for place in range(1, 38))
    found = perplexity(model, [ids], task.alphabet.end_id, window=16, words=10, num_bytes=50)
    assert found["tokens"] == 37
    assert found["nats"] == pytest.approx(windowed, rel=1e-5)
    assert found["per_token"] == pytest.approx(math.exp(windowed / 37), rel=1e-5)
    assert found["per_word"] == pytest.approx(math.exp(windowed / 10), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(windowed / 50 / math.log(2), rel=1e-5)
    assert (found["form"], found["stride"]) == ("windowed", 16)
    by_strides = perplexity(model, [ids], task.alphabet.end_id, window=16, stride=4)
    assert by_strides["nats"] == pytest.approx(strided, rel=1e-5)
    assert (by_strides["form"], by_strides["per_word"]) == ("strided", None)


def test_texts_do_not_change_one_another(made):
    model, task = made
    texts = [np.arange(size) % len(task.alphabet) for size in (5, 30, 1)]
    together = perplexity(model, texts, task.alphabet.end_id, window=8)
    apart = [perplexity(model, [text], task.alphabet.end_id, window=8)["nats"] for text in texts]
    assert together["nats"] == pytest.approx(sum(apart), rel=1e-6)
    assert (together["texts"], together["tokens"]) == (3, 36)


def test_a_corpus_and_its_files_have_the_same_perplexity(made, corpus: Path):
    model, task = made
    prepared = score_text(model, task, corpus, "test")
    files = score_text(model, task, corpus.parent / "wiki.test.tokens", "test")
    assert prepared["nats"] == pytest.approx(files["nats"], rel=1e-6)
    assert prepared["words"] == files["words"] == len(TEXT.split()) + TEXT.count("\n")
    assert prepared["bytes"] == files["bytes"] == len(TEXT)
    assert prepared["tokens"] == len(TEXT)
    assert (prepared["split"], files["split"], prepared["texts"]) == ("test", "files", 2)


def test_what_cannot_be_scored_is_refused(made, corpus: Path, tmp_path: Path):
    model, task = made
    (tmp_path / "a.txt").write_text("Ω", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"a.txt: character 'Ω' is not in the model's alphabet"):
        score_text(model, task, tmp_path / "a.txt", "test")
    with pytest.raises(UserError, match="a text of 0 tokens"):
        score_text(model, task, tmp_path / "empty.txt", "test")
    with pytest.raises(UserError, match=r"its tokens are of a vocabulary of .* and is another"):
        score_text(model, AdditionConfig().build(), corpus, "test")
    with pytest.raises(UserError, match="window: the model reads at most 17 tokens, got 99"):
        list(nats(model, [np.arange(4)], window=99))
    with pytest.raises(UserError, match="stride: expected 1 to 8 tokens"):
        list(nats(model, [np.arange(4)], window=8, stride=9))
