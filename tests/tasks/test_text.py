"""Text as a task: rows of a corpus, documents kept apart, and corpora that are damaged or of another vocabulary."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tasks.vocabularies import trained, write_pair
from trivium.config import UserError, from_dict
from trivium.data.corpora import local_sources
from trivium.data.prepare import prepare_text
from trivium.data.tokenizers import BytePairTokenizer
from trivium.model.base import ModelConfig
from trivium.model.context import model_context
from trivium.tasks.base import TaskConfig
from trivium.tasks.byte_pairs import BytePairs
from trivium.tasks.mixture import join
from trivium.tasks.shards import INDEX, Corpus, Shard
from trivium.tasks.shortened import without_chain
from trivium.tasks.text import TextConfig
from trivium.train.reads import reads

TEXTS = {
    "train.txt": "one naive café says: hello\n" * 9,
    "valid.txt": "the other says: bye\n",
    "test.txt": "and a third, <|endoftext|>\n",
}


def corpus(folder: Path, tokenizer: str | None = None, texts: dict[str, str] = TEXTS, **options) -> Path:
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    for name, text in texts.items():
        (raw / name).write_text(text, encoding="utf-8")
    prepare_text("text", local_sources(raw), folder / "made", tokenizer, **options)
    return folder / "made"


def byte_pairs(folder: Path) -> str:
    (folder / "bpe").mkdir(exist_ok=True)
    BytePairTokenizer(BytePairs.from_tokenizers(trained())).save(folder / "bpe")
    return str(folder / "bpe")


def letters(folder: Path, **options) -> TextConfig:
    config = TextConfig.examples(folder)[0]
    return TextConfig(config.corpus, **options)


@pytest.mark.parametrize("characters", [True, False])
def test_the_stream_is_the_text_and_every_token_of_it_is_predicted_once(characters: bool, tmp_path: Path):
    folder = corpus(tmp_path, None if characters else byte_pairs(tmp_path))
    task = TextConfig(folder, length=5).build()
    end = task.alphabet.end
    for split, name in (("train", "train.txt"), ("validation", "valid.txt"), ("test", "test.txt")):
        size = task.size(split)
        batch = task.gather(split, np.arange(size))
        inside = batch.weights_BT > 0
        predicted = batch.targets_BT[inside]
        assert task.alphabet.decode(predicted) == TEXTS[name] + end
        assert batch.tokens_BT[0, 0] == task.alphabet.end_id, "the first token is told from the end symbol"
        assert (batch.tokens_BT[inside][1:] == predicted[:-1]).all()


def test_a_special_that_is_spelt_in_a_text_is_text(tmp_path: Path):
    task = TextConfig(corpus(tmp_path, byte_pairs(tmp_path)), length=64).build()
    targets = task.gather("test", np.arange(1)).targets_BT[0]
    assert (targets == task.alphabet.end_id).sum() == 1


def test_documents_of_a_row_are_told_apart(tmp_path: Path):
    task = letters(tmp_path, length=60).build()
    batch = task.gather("train", np.array([0, 1]))
    assert batch.documents_BT is not None
    ends_T = batch.tokens_BT[0] == task.alphabet.end_id
    assert ends_T.sum() == 4
    assert (np.diff(batch.documents_BT[0]) == ends_T[1:]).all()
    assert letters(tmp_path, length=60, separate=False).build().gather("train", np.arange(2)).documents_BT is None
    assert task.gather("train", np.array([1])).documents_BT is None, "a row of one document needs no mask"


def test_a_packed_document_is_predicted_as_it_is_alone(tmp_path: Path):
    task = letters(tmp_path, length=60).build()
    model = from_dict(ModelConfig, {"layers": "attention*2", "width": 32}, "model")
    torch.manual_seed(0)
    built = model.build(model_context(task, model)).eval()
    batch = task.gather("train", np.array([0]))
    read = reads(batch, batch.weights_BT)[0]
    tokens, documents = torch.from_numpy(batch.tokens_BT), torch.from_numpy(read.documents_BT)
    packed, _ = built(tokens, **{name: torch.from_numpy(value) for name, value in read.given().items()})
    joined, _ = built(tokens)
    for number in range(4):
        here = documents[0] == number
        alone, _ = built(tokens[:, here])
        torch.testing.assert_close(packed[:, here], alone, rtol=1e-4, atol=1e-5)
    assert (packed - joined).abs().max() > 1e-3


def test_what_is_done_to_a_batch_keeps_its_documents(tmp_path: Path):
    task = letters(tmp_path, length=20).build()
    batch = task.gather("train", np.arange(4))
    documents_BT = batch.documents_BT
    assert documents_BT is not None
    assert (batch.take(np.array([2, 0])).documents_BT == documents_BT[[2, 0]]).all()
    kept = without_chain(batch, 3, task.alphabet.pad_id)  # there is no chain
    for name in ("tokens_BT", "targets_BT", "documents_BT"):
        assert (getattr(kept, name) == getattr(batch, name)).all(), name
    with pytest.raises(ValueError, match=r"may lie in another document"):
        batch.shifted(1)
    alone = dataclasses.replace(task.gather("train", np.array([1])), documents_BT=None)
    joined = join([(np.array([1, 3, 0, 4]), batch), (np.array([2]), alone)], task.alphabet.pad_id)
    assert joined.documents_BT is not None
    assert (joined.documents_BT[[1, 3, 0, 4]] == documents_BT).all()
    assert (joined.documents_BT[2] == 0).all()
    parts = reads(batch, batch.weights_BT, 3, longest=64)
    assert [len(part.documents_BT) for part in parts] == [3, 1]
    assert all(part.documents_BT.shape == part.tokens_BT.shape for part in parts)


def test_a_model_that_begins_documents_at_chunks_only_is_refused(tmp_path: Path):
    model = from_dict(ModelConfig, {"kind": "prefix_scan", "chunk": 4}, "model")
    with pytest.raises(UserError, match=r"task.separate: this model begins documents at multiples of 4 tokens only"):
        model_context(letters(tmp_path, length=16).build(), model)
    model_context(letters(tmp_path, length=16, separate=False).build(), model)


@pytest.mark.parametrize("characters", [True, False])
def test_a_task_whose_vocabulary_is_known_needs_no_corpus(characters: bool, tmp_path: Path):
    folder = corpus(tmp_path, None if characters else byte_pairs(tmp_path))
    config = TextConfig(folder, length=8).build().config
    assert (config.alphabet is None) != characters
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / INDEX).unlink()
    again = config.build()
    assert (again.max_length, again.config) == (9, config)
    with pytest.raises(UserError, match=r"no corpus: it has no corpus.json; trivium data prepare makes one"):
        again.example("train", 0)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path):
    folder = corpus(tmp_path, byte_pairs(tmp_path))
    write_pair(tmp_path / "other", size=300)
    with pytest.raises(UserError, match=r"its 320 tokens are not those of the tokenizer .* which has 300"):
        TextConfig(folder, tokenizer=str(tmp_path / "other")).build().size("train")
    write_pair(folder, ("vocab.json", "merges.txt"), size=320)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"its tokens are not of the tokenizer beside them"):
        TextConfig(folder).build()


@pytest.mark.parametrize("cut", [1, 9, 60])
def test_a_shard_that_is_cut_short_is_refused(cut: int, tmp_path: Path):
    config = letters(tmp_path, length=16)
    path = next(config.corpus.glob("train-*"))
    path.write_bytes(path.read_bytes()[:-cut])
    task = config.build()
    with pytest.raises(UserError, match=r"train-00000.safetensors: cut short or damaged"):
        task.example("train", 0)


def test_a_shard_that_is_another_one_is_refused(tmp_path: Path):
    config = letters(tmp_path, length=16)
    short = next(config.corpus.glob("test-*"))
    path = next(config.corpus.glob("train-*"))
    index = (config.corpus / INDEX).read_text(encoding="utf-8")
    (config.corpus / INDEX).write_text(index.replace('"tokens": 138', '"tokens": 137'), encoding="utf-8")
    with pytest.raises(UserError, match=r"138 tokens of 4 documents where corpus.json says 137 of 4"):
        config.build().example("train", 0)
    path.unlink()
    short.rename(path)
    with pytest.raises(UserError, match=r"train-00000.safetensors: "):
        config.build().example("train", 0)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000.safetensors: no such file; prepare the corpus again"):
        config.build().example("train", 0)


def test_shards_are_mapped_and_rows_reach_across_them(tmp_path: Path):
    texts = {f"train-{number}.txt": f"text number {number}. " * 3 for number in range(6)} | {"test.txt": "x"}
    folder = corpus(tmp_path, byte_pairs(tmp_path), texts, shard_bytes=40)
    made = Corpus(folder)
    assert len(made.shards("train")) == 6
    assert isinstance(Shard(next(folder.glob("train-*"))).tokens, np.memmap)
    whole = made.read("train", 0, 10**6)
    assert len(whole) == made.size("train")
    assert made.vocabulary.decode(whole).split("<|endoftext|>")[1:-1] == list(texts.values())[:6]
    for start in range(0, len(whole), 7):
        assert (made.read("train", start, 40) == whole[start : start + 40]).all()
    documents = [made.vocabulary.decode(ids) for ids in made.documents("train")]
    assert documents == list(texts.values())[:6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length: expected 1 or more"),
        ({"alphabet": ["a"]}, "alphabet: expected two symbols or more"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        from_dict(TaskConfig, {"kind": "text", "corpus": "nowhere", **options}, "task")
