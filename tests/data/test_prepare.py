"""Corpora from files: the same however many processes make them, whole or not there, and made on after a kill."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tasks.vocabularies import trained
from trivium.config import UserError, from_dict
from trivium.data import tokenise
from trivium.data.corpora import local_sources
from trivium.data.documents import count_wikitext_words
from trivium.data.prepare import Progress, prepare_problems, prepare_text
from trivium.data.tokenizers import BytePairTokenizer
from trivium.data.train_tokenizer import train_tokenizer
from trivium.tasks.base import TaskConfig
from trivium.tasks.byte_pairs import BytePairs, load_byte_pairs
from trivium.tasks.shards import INDEX, Corpus, read_index

DOCUMENTS = [f"document {number}: " + "the sum of two and three, " * (number % 7 + 1) for number in range(60)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe")
    BytePairTokenizer(BytePairs.from_tokenizers(trained())).save(folder)
    return str(folder)


def raw(folder: Path, documents: list[str] = DOCUMENTS, name: str = "texts.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_corpus_does_not_depend_on_the_number_of_processes(pairs: str, tmp_path: Path):
    source = raw(tmp_path / "raw")
    for jobs in (1, 2):
        made = prepare_text("text", local_sources(source), tmp_path / str(jobs), pairs, jobs=jobs, shard_bytes=500)
        assert made["made"] == sum(made["tokens"].values())
    assert len(list((tmp_path / "1").glob("train-*"))) > 5
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_whole_documents_are_held_out_whatever_their_order(pairs: str, tmp_path: Path):
    held: list[dict[str, set[str]]] = []
    for number, documents in enumerate((DOCUMENTS, [*DOCUMENTS[::-1], DOCUMENTS[3]])):
        folder = tmp_path / str(number)
        prepare_text("text", local_sources(raw(folder / "raw", documents)), folder / "made", pairs, held_out=0.1)
        corpus = Corpus(folder / "made")
        decode = corpus.vocabulary.decode
        found = {split: {decode(ids) for ids in corpus.documents(split)} for split in ("train", "validation", "test")}
        assert set.union(*found.values()) == set(documents)
        assert sum(map(len, found.values())) == len(set(documents)), "no document is in two splits"
        assert 0.05 < corpus.count("test", "bytes") / sum(len(text) for text in documents) < 0.2
        held.append(found)
    assert len(held[0]["test"] & held[1]["test"]) > len(held[0]["test"]) / 2


def test_a_test_file_stays_whole_beside_files_whose_names_tell_nothing(pairs: str, tmp_path: Path):
    source = raw(tmp_path / "raw").parent
    (source / "test.txt").write_text("never seen in training\n" * 9, encoding="utf-8")
    prepare_text("text", local_sources(source), tmp_path / "made", pairs)
    corpus = Corpus(tmp_path / "made")
    assert [corpus.vocabulary.decode(ids) for ids in corpus.documents("test")] == ["never seen in training\n" * 9]
    assert not corpus.has("validation")
    assert corpus.count("train", "documents") == len(DOCUMENTS)


def test_the_end_of_a_single_text_is_held_out(pairs: str, tmp_path: Path):
    text = "a line of text\n" * 200
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    prepare_text("text", local_sources(tmp_path / "book.txt"), tmp_path / "made", pairs, held_out=0.05)
    corpus = Corpus(tmp_path / "made")
    parts = [corpus.vocabulary.decode(next(corpus.documents(split))) for split in ("train", "validation", "test")]
    assert "".join(parts) == text
    assert all(part.endswith("text\n") for part in parts)
    assert 0.03 < len(parts[2]) / len(text) < 0.07


def test_a_prepared_corpus_is_made_on_where_it_was_left(pairs: str, tmp_path: Path):
    source, folder = raw(tmp_path / "raw"), tmp_path / "made"
    options = {"jobs": 1, "shard_bytes": 500}
    prepare_text("text", local_sources(source), folder, pairs, **options)
    whole = content(folder)
    gone = sorted(folder.glob("train-*"))[2:4]
    gone[0].unlink()
    gone[1].write_bytes(gone[1].read_bytes()[:-3])
    (folder / INDEX).unlink()
    (folder / ".train-00001.safetensors.abcd.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=r"was not prepared to the end; run its command again"):
        read_index(folder)
    seen = []
    made = prepare_text(
        "text",
        local_sources(source),
        folder,
        pairs,
        **options,
        progress=Progress(show=lambda now: seen.append(now.done)),
    )
    assert content(folder) == whole
    assert 0 < made["made"] < made["kept"]
    assert seen[-1] == sum(len(text.encode()) for text in DOCUMENTS)


def test_shards_of_another_text_or_tokenizer_are_made_anew(pairs: str, tmp_path: Path):
    folder = tmp_path / "made"
    prepare_text("text", local_sources(raw(tmp_path / "raw")), folder, pairs, shard_bytes=500)
    other = raw(tmp_path / "other", [text.upper() for text in DOCUMENTS[:20]])
    made = prepare_text("text", local_sources(other), folder, pairs, shard_bytes=500)
    assert made["kept"] == 0
    prepare_text("text", local_sources(other), tmp_path / "fresh", pairs, shard_bytes=500)
    assert content(folder) == content(tmp_path / "fresh")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is not known here")
def test_a_command_that_was_killed_goes_on_and_gives_the_same(pairs: str, tmp_path: Path):
    source = raw(tmp_path / "raw", DOCUMENTS * 100)
    small_shards = (
        "import sys\nfrom trivium.cli import main\nfrom trivium.data.prepare import prepare_text\n"
        "prepare_text.__kwdefaults__['shard_bytes'] = 2000\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = ["data", "prepare", "text", "--from", str(source), "--jobs", "1", "--tokenizer", pairs]
    command = [sys.executable, "-c", small_shards, *arguments, "--out", str(tmp_path / "made")]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while len(list((tmp_path / "made").glob("train-*"))) < 5:
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "made" / INDEX).exists()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    assert made["kept"] > 0
    prepare_text("text", local_sources(source), tmp_path / "fresh", pairs, shard_bytes=2000)
    assert content(tmp_path / "made") == content(tmp_path / "fresh")


def test_a_full_disk_leaves_no_corpus(pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    folder = tmp_path / "made"
    monkeypatch.setattr(tokenise, "write_whole", full)
    with pytest.raises(OSError, match=r"No space left"):
        prepare_text("text", local_sources(raw(tmp_path / "raw")), folder, pairs)
    with pytest.raises(UserError, match=r"no corpus"):
        read_index(folder)


def test_text_of_0_tokens_and_odd_folders_are_refused(pairs: str, tmp_path: Path):
    empty = raw(tmp_path / "empty", ["", ""])
    with pytest.raises(UserError, match=r"texts.jsonl: a text of 0 tokens"):
        prepare_text("text", local_sources(empty), tmp_path / "made", pairs)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"taken: holds thesis.tex, which is of no corpus"):
        prepare_text("text", local_sources(raw(tmp_path / "raw")), tmp_path / "taken", pairs)
    with pytest.raises(UserError, match=r"--held-out: expected a share above 0"):
        prepare_text("text", local_sources(raw(tmp_path / "raw")), tmp_path / "made", pairs, held_out=0.7)


def test_words_are_counted_where_the_corpus_defines_them(pairs: str, tmp_path: Path):
    text = " \n = One = \n \n Words of one . \n \n = Two = \n \n More . \n"
    (tmp_path / "wiki.test.tokens").write_text(text, encoding="utf-8")
    prepare_text("wikitext2", local_sources(tmp_path), tmp_path / "made", pairs)
    corpus = Corpus(tmp_path / "made")
    assert corpus.count("test", "words") == count_wikitext_words(text)
    assert corpus.count("test", "documents") == 2
    assert not corpus.has("train")
    with pytest.raises(UserError, match=r"this corpus has no train text"):
        corpus.size("train")


def test_problems_are_written_for_their_task(tmp_path: Path):
    rows = [{"question": f"{n} and 1?", "answer": f"<<{n}+1={n + 1}>>\n#### {n + 1}", "odd": 1} for n in range(9)]
    (tmp_path / "raw").mkdir()
    for split, part in (("train", rows[:7]), ("test", rows[7:])):
        path = tmp_path / "raw" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    made = prepare_problems("gsm8k", local_sources(tmp_path / "raw"), tmp_path / "gsm8k")
    assert made["problems"] == {"test": 2, "train": 7}
    task = from_dict(
        TaskConfig,
        {"kind": "word_problems", "train": str(tmp_path / "gsm8k" / "train.jsonl"), "held_out": 2},
        "task",
    ).build()
    assert task.size("train") == 5
    before = content(tmp_path / "gsm8k")
    with (tmp_path / "raw" / "train.jsonl").open("a") as file:
        file.write('{"question": "no answer?"}\n')
    (tmp_path / "raw" / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match=r"train.jsonl:8: answer is missing; it has question"):
        prepare_problems("gsm8k", local_sources(tmp_path / "raw"), tmp_path / "gsm8k")
    assert content(tmp_path / "gsm8k") == before, "the test's new rows would stand beside the old ones of training"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"No space left.*gsm8k/test\.jsonl'"):
            prepare_problems("gsm8k", local_sources(tmp_path / "raw" / "test.jsonl"), tmp_path / "gsm8k")
    assert content(tmp_path / "gsm8k") == before
    (tmp_path / "raw" / "train.jsonl").unlink()
    prepare_problems("gsm8k", local_sources(tmp_path / "raw"), tmp_path / "gsm8k")
    assert set(content(tmp_path / "gsm8k")) == {"test.jsonl", "source.json"}


def test_problems_of_which_a_killed_command_left_a_part_are_no_test_and_are_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    class Killed(BaseException):
        pass

    folder, moved = tmp_path / "made", Path.replace

    def half(path: Path, target: Path) -> Path:
        if path.name == ".test.jsonl.tmp":
            raise Killed
        return moved(path, target)

    (tmp_path / "raw").mkdir()
    for split in ("train", "test"):
        row = {"question": f"{split}?", "answer": "#### 1"}
        (tmp_path / "raw" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    sources = local_sources(tmp_path / "raw")[::-1]
    whole = prepare_problems("gsm8k", sources, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", half)
        with pytest.raises(Killed):
            prepare_problems("gsm8k", sources, folder)
    assert not (folder / "source.json").exists()
    with pytest.raises(UserError, match=r"made: was not prepared to the end; run its command again"):
        prepare_problems("gsm8k", sources, tmp_path / "other", without=[folder])
    with pytest.raises(UserError, match=r"made: was not prepared to the end"):
        local_sources(tmp_path)
    with (tmp_path / "raw" / "train.jsonl").open("a") as file:
        file.write('{"question": "no answer?"}\n')
    with pytest.raises(UserError, match="answer is missing"):
        prepare_problems("gsm8k", sources, folder)
    with pytest.raises(UserError, match=r"made: was not prepared to the end"):
        local_sources(folder)
    (tmp_path / "raw" / "train.jsonl").write_text(json.dumps({"question": "train?", "answer": "#### 1"}) + "\n")
    assert prepare_problems("gsm8k", sources, folder) == whole
    assert "made: was not prepared to the end by an earlier command; all of it is made anew" in caplog.text
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "test.jsonl", "source.json"}


def test_problems_of_a_test_are_left_out_of_training_however_they_are_written(tmp_path: Path):
    def written(name: str, problems: list[str]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        rows = [{"problem": problem, "solution": "$\\boxed{1}$"} for problem in problems]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    test = written("math500/test.jsonl", [r"Find $x$ if $\dfrac{x}{2} = 3$.", "What is $1+1$?"])
    own = ["Find $x$ if\n$\\frac{x}{2}=3$.", "What is $1-1$?", "What is 1 + 1?", "What is 1 + 11?"]
    written("raw/train.jsonl", own)
    written("raw/test.jsonl", own[:1])
    sources = local_sources(tmp_path / "raw")
    made = prepare_problems("numinamath", sources, tmp_path / "made", without=[test])
    assert (made["problems"], made["compared_with"], made["left_out"]) == ({"test": 1, "train": 2}, 2, 2)
    kept = [json.loads(line)["problem"] for line in (tmp_path / "made" / "train.jsonl").read_text().splitlines()]
    assert kept == [own[1], own[3]]
    assert prepare_problems("numinamath", sources, tmp_path / "made")["problems"]["train"] == 4
    with pytest.raises(UserError, match="holds no problems but the 4 that are left out"):
        prepare_problems("numinamath", sources, tmp_path / "made", without=[tmp_path / "raw"])
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"text": "1"}\n')
    with pytest.raises(UserError, match=r"odd.jsonl:1: has neither problem nor question; it has text"):
        prepare_problems("numinamath", sources, tmp_path / "made", without=[odd])


def test_a_vocabulary_is_trained_on_a_persons_own_text(tmp_path: Path):
    source = raw(tmp_path / "raw")
    vocabulary = train_tokenizer([source], 300, tmp_path / "bpe")
    assert len(vocabulary) == 300
    again = load_byte_pairs(tmp_path / "bpe")
    assert again == vocabulary
    ids = again.encode_ordinary(DOCUMENTS[5])
    assert again.decode(ids) == DOCUMENTS[5]
    assert len(ids) < len(DOCUMENTS[5]) / 2
    made = prepare_text("text", local_sources(source), tmp_path / "made", str(tmp_path / "bpe"))
    assert made["vocabulary"] == 300
    assert np.max(Corpus(tmp_path / "made").read("train", 0, 10**6)) < 300


@pytest.mark.parametrize(
    ("size", "documents", "message"),
    [
        (256, DOCUMENTS, "--size: expected 257"),
        (5000, DOCUMENTS[:1], "--size: the text has pairs for .* tokens only"),
        (300, [""], "a text of 0 tokens"),
    ],
)
def test_a_vocabulary_that_cannot_be_trained_is_refused(size: int, documents: list[str], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        train_tokenizer([raw(tmp_path / "raw", documents)], size, tmp_path / "bpe")
    assert not (tmp_path / "bpe").exists()
