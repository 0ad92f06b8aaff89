"""Documents from files, and files that are cut short or hold something else."""

import gzip
import json
from pathlib import Path

import pytest

from trivium.config import UserError
from trivium.data.documents import (
    articles_of,
    count_wikitext_words,
    documents_of,
    field_of,
    files_in,
    rows_of,
    split_named,
)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"),
        ("wiki.valid.tokens", "validation"),
        ("my-test.jsonl.gz", "test"),
        ("dev_1.txt", "validation"),
        ("train-00000-of-00002.parquet", "train"),
        ("latest.txt", None),
        ("training.txt", None),
        ("contest.txt", None),
    ],
)
def test_a_files_name_tells_its_split(name: str, split: str | None):
    assert split_named(Path(name)) == split


def test_every_kind_of_file_gives_its_documents(tmp_path: Path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow
    import pyarrow.parquet

    texts = ["one", "two\n\nlines ü", ""]
    lines = "\n\n".join(json.dumps({"text": text, "n": 1}) for text in texts)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.txt").write_text("\ufeffwhole\nfile\n", encoding="utf-8")
    (tmp_path / "d.md.gz").write_bytes(gzip.compress(b"whole file", mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "e.parquet")
    (tmp_path / "f.png").write_bytes(b"no text")
    found = files_in(tmp_path)
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl.gz", "c.txt", "d.md.gz", "e.parquet"]
    assert [list(documents_of(path)) for path in found] == [texts, texts, ["whole\nfile\n"], ["whole file"], texts]
    assert [where.rpartition(":")[2] for where, _ in rows_of(tmp_path / "a.jsonl")] == ["1", "3", "5"]
    with pytest.raises(UserError, match=r"e.parquet:1: body is missing; it has text"):
        list(documents_of(tmp_path / "e.parquet", "body"))


def test_wikitext_is_cut_into_its_articles(tmp_path: Path):
    text = " \n = One = \n \n Words of one . \n \n = = Part = = \n \n x = y \n \n = Two = \n \n More . \n"
    (tmp_path / "wiki.test.tokens").write_text(text, encoding="utf-8")
    articles = list(articles_of(tmp_path / "wiki.test.tokens"))
    assert "".join(articles) == text
    assert [article.split()[1] for article in articles] == ["One", "Two"]
    # Merity et al. count each line's end: 245,569 for WikiText-103's test file.
    assert sum(map(count_wikitext_words, articles)) == len(text.split()) + text.count("\n")
    rows = [{"text": "" if line == " \n" else line} for line in text.splitlines(keepends=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert list(articles_of(tmp_path / "rows.jsonl")) == articles


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl:2: not JSON .* the file may be cut short"),
        ("a.jsonl", b'["x"]\n', r"a.jsonl:1: not an object of named fields"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: text is missing; it has body"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: text is not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1: text holds half a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-9], r"a.jsonl.gz: cannot be read: cut short"),
        ("a.txt.gz", b"not gzip", r"a.txt.gz: cannot be read: cut short or damaged"),
        ("a.txt", b"one\ntwo \xff\n", r"a.txt:2: not UTF-8 text"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet: cut short or no Parquet file"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(name: str, content: bytes, message: str, tmp_path: Path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(documents_of(tmp_path / name))


def test_places_without_text_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such file or folder"):
        files_in(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no text; expected files that end in .txt"):
        files_in(tmp_path)
    (tmp_path / "x.png").touch()
    with pytest.raises(UserError, match=r"x.png: of no kind that is read"):
        files_in(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"here: a is not text; it has a"):
        field_of({"a": None}, "a", "here")
