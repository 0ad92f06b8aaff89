"""The benchmark of tokenising: rows with rates, and tokens that are compared before anything is timed."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tasks.vocabularies import TEXT, write_pair
from trivium.bench.gates import WrongResult
from trivium.bench.tokenise import bench_tokenise, check_tokens
from trivium.cli import main
from trivium.config import UserError
from trivium.data.corpora import local_sources
from trivium.tasks.byte_pairs import load_byte_pairs


def test_every_row_has_its_rates(tmp_path: Path, capsys):
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(TEXT + name, encoding="utf-8")
    folder, out = write_pair(tmp_path / "pairs"), tmp_path / "out.json"
    given = ["--from", str(tmp_path / "texts"), "--tokenizer", str(folder), "--jobs", "1", "--repeats", "2"]
    assert main(["bench", "tokenise", *given, "--out", str(out)]) == 0
    assert "M tokens/s" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        assert len(row["tokens_per_second"]["each"]) == 2
        assert row["tokens_per_second"]["median"] > 0
    assert found["documents"] == 3
    assert found["tokens"] == sum(len(load_byte_pairs(folder).encode_ordinary(TEXT + name)) for name in "abc")
    assert found["rows"][0]["seconds"]["whole"] >= found["rows"][0]["seconds"]["tokenising"] > 0
    assert main(["bench", "tokenise", *given[:-1], "0"]) == 2


def test_other_tokens_than_tiktokens_are_not_timed(tmp_path: Path):
    class Other:
        def encode_to_numpy(self, text: str, **_: object) -> np.ndarray:
            return np.zeros(3, np.uint32)

    with pytest.raises(WrongResult, match="document 1 has other tokens"):
        check_tokens(load_byte_pairs(write_pair(tmp_path)), Other(), [TEXT])
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(UserError, match="a text of 0 tokens"):
        bench_tokenise(local_sources(tmp_path / "a.jsonl"), str(tmp_path))
