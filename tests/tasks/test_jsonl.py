"""A user's own problems: their shape, their vocabulary, and the mistakes that are told to him."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tasks.vocabularies import write_pair
from trivium.config import UserError, from_dict, to_dict
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import ANSWER, CHAIN, PROMPT, TaskConfig
from trivium.tasks.jsonl import JsonlConfig, read_rows


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(prompt: str, answer: str, **tags: object) -> dict[str, object]:
    return {"prompt": prompt, "answer": answer, "tags": tags}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "not an object"),
        ({"prompt": "1+1="}, "answer is missing"),
        ({"prompt": "1+1=", "answer": 2}, "answer is not text"),
        ({"prompt": "", "answer": "2"}, "prompt is empty"),
        ({"prompt": "1+1=", "answer": "2", "tag": {}}, "unknown key 'tag'"),
        ({"prompt": "1+1=", "answer": "2", "tags": [1]}, "tags are not"),
        ({"prompt": "1+1=", "answer": "2", "tags": {"digits": 1.5}}, "tags are not"),
        ("[" * 100_000, "not JSON"),
        ({"prompt": "1+1=\ud800", "answer": "2"}, "prompt holds half a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "train.jsonl", row("1+1=", "2"), "", line)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"train\.jsonl:3: "):
        JsonlConfig(train=path).build()


def test_a_missing_an_empty_and_an_unreadable_file_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no problems"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "latin.jsonl")


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1+1=", "answer": "2"}\r\n\r\n{"prompt": "1+2=", "answer": "3"}')
    assert [(row.prompt, row.answer) for row in read_rows(path)] == [("1+1=", "2"), ("1+2=", "3")]


def test_an_answer_that_goes_on_behind_its_end_is_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", row("1+1=", "2<end>"), row("1+2=", "3<end>4"))
    with pytest.raises(UserError, match=r"train\.jsonl:2: the answer goes on behind <end>"):
        JsonlConfig(train=train).build()


def test_no_symbol_reaches_from_the_prompt_into_the_answer(tmp_path):
    train = write(tmp_path / "train.jsonl", row("a<", "b>c"), row("<b>", "c"))
    task = JsonlConfig(train=train).build()
    batch = task.batch("train", 0, 1)
    assert batch.prompt_lengths_B[0] == 2
    tokens = [*batch.tokens_BT[0], batch.targets_BT[0, -1]]
    assert [task.alphabet.symbols[token] for token in tokens] == ["a", "<", "b", ">", "c", "<end>"]


def test_rows_are_read_with_their_tags(tmp_path):
    path = write(tmp_path / "a.jsonl", row("1+1=", "2", digits=1, kind="easy"), {"prompt": "2+2=", "answer": "4"})
    rows = read_rows(path)
    assert [(example.prompt, example.answer) for example in rows] == [("1+1=", "2"), ("2+2=", "4")]
    assert [dict(example.tags) for example in rows] == [{"digits": 1, "kind": "easy"}, {}]


def test_the_vocabulary_is_what_the_files_hold(tmp_path):
    train = write(tmp_path / "train.jsonl", row("3<5 ", "yes"), row("b=", "<think>1\n</think>no<end>"))
    test = write(tmp_path / "test.jsonl", row("Ж", "7"))
    task = JsonlConfig(train=train, test=test).build()
    assert set(task.alphabet.symbols) == {*"357<yesnob= 1\nЖ", "<think>", "</think>", "<end>"}
    assert task.alphabet.digits == ("1", "3", "5", "7")
    assert task.example("train", 0).answer == "yes<end>"
    assert task.example("train", 1).answer == "<think>1\n</think>no<end>"
    assert task.regions(task.example("train", 1)) == [PROMPT] * 2 + [CHAIN] * 4 + [ANSWER] * 3
    assert task.max_length == len(task.regions(task.example("train", 1)))


def test_an_answer_is_right_only_when_equal(tmp_path):
    task = JsonlConfig(train=write(tmp_path / "train.jsonl", row("1+1=", "<think>x</think>12"))).build()
    example = task.example("train", 0)
    for text, correct in (("<think>y</think>12<end>", True), ("12", False), ("1<end>", False), ("123<end>", False)):
        assert task.verify(example, text).correct is correct


@pytest.mark.parametrize(
    ("prompt", "answer", "wrong"), [("7", "7", "77"), ("ab", "abab", "ababab"), ("1", "12", "112")]
)
def test_an_answer_that_begins_with_its_prompt_is_not_mistaken_for_the_prompt(tmp_path, prompt, answer, wrong):
    task = JsonlConfig(train=write(tmp_path / "train.jsonl", row(prompt, answer))).build()
    example = task.example("train", 0)
    assert task.verify(example, answer + "<end>").correct
    assert not task.verify(example, wrong + "<end>").correct


def test_a_chain_may_be_opened_by_the_prompt(tmp_path):
    task = JsonlConfig(train=write(tmp_path / "train.jsonl", row("1+1=<think>", "one more</think>2"))).build()
    example = task.example("train", 0)
    assert task.verify(example, "more</think>2<end>").correct
    assert not task.verify(example, "more</think>1<end>").correct


def test_a_test_problem_that_is_also_trained_on_is_refused_with_both_places(tmp_path):
    train = write(tmp_path / "train.jsonl", row("1+1=", "2"), row("1+2=", "3"))
    test = write(tmp_path / "test.jsonl", row("2+2=", "4"), row("1+2=", "3"))
    with pytest.raises(UserError) as error:
        JsonlConfig(train=train, test=test).build()
    assert f"{test}:2" in str(error.value)
    assert f"{train}:2" in str(error.value)


def test_a_split_without_a_file_is_asked_for_by_name(tmp_path):
    task = JsonlConfig(train=write(tmp_path / "train.jsonl", row("1+1=", "2"))).build()
    for use in (task.size, lambda split: task.example(split, 0), lambda split: task.batch(split, 0, 1)):
        with pytest.raises(UserError, match=r"task\.validation"):
            use("validation")
    with pytest.raises(IndexError):
        task.example("train", 1)
    with pytest.raises(IndexError):
        task.batch("train", 0, 2)


def test_a_resolved_config_builds_where_the_files_are_not(tmp_path):
    train = write(tmp_path / "train.jsonl", row("1+1=", "2"))
    config = from_dict(TaskConfig, {"kind": "jsonl", "train": str(train)})
    before = config.build()
    resolved = from_dict(TaskConfig, to_dict(config.resolved()))
    train.unlink()
    task = resolved.build()
    assert task.alphabet == before.alphabet
    assert task.max_length == before.max_length
    assert task.config == before.config
    with pytest.raises(UserError, match="no such file"):
        task.example("train", 0)


def test_an_explicit_alphabet_must_hold_every_character(tmp_path):
    train = write(tmp_path / "train.jsonl", row("1+1=", "2"))
    assert JsonlConfig(train=train, alphabet=("2", "1", "=", "+", "<end>")).build().alphabet.id_of("2") == 0
    with pytest.raises(UserError, match=r"train\.jsonl:1: character '2'"):
        JsonlConfig(train=train, alphabet=("1", "=", "+", "<end>")).build()
    with pytest.raises(UserError, match="alphabet"):
        JsonlConfig(train=train, alphabet=("1", "1", "<end>"))
    with pytest.raises(UserError, match="alphabet"):
        JsonlConfig(train=train, alphabet=("1",))
    with pytest.raises(UserError, match="max_length"):
        JsonlConfig(train=train, max_length=1)
    with pytest.raises(UserError, match=r"max_length: 4 is given, .*train\.jsonl:1 has a problem of 6 tokens"):
        JsonlConfig(train=train, max_length=4).build().batch("train", 0, 1)


def test_sums_written_out_are_read_back_with_the_same_tokens(tmp_path):
    addition = AdditionConfig(format="column", max_digits=2).build()
    examples = addition.examples("train", np.arange(30))
    rows = [row(example.prompt, example.answer, **example.tags) for example in examples]
    task = JsonlConfig(train=write(tmp_path / "train.jsonl", *rows), alphabet=addition.alphabet.symbols).build()
    assert (task.batch("train", 0, 30).targets_BT == addition.batch("train", 0, 30).targets_BT).all()
    assert (task.batch("train", 0, 30).regions_BT == addition.batch("train", 0, 30).regions_BT).all()


def test_problems_may_be_read_with_byte_pairs(tmp_path):
    path = write(tmp_path / "train.jsonl", row("Two and two? ", "<think>2+2</think>-five"), row("é", "漢"))
    config = JsonlConfig(train=path, tokenizer=str(write_pair(tmp_path / "bpe")))
    task = config.build()
    batch = task.batch("train", 0, 2)
    assert len(task.alphabet) == 320
    end = "<|endoftext|>"
    for index, wanted in enumerate((f"Two and two? <think>2+2</think>-five{end}", f"é漢{end}")):
        ids = [*batch.tokens_BT[index, : batch.lengths_B[index]], batch.targets_BT[index, batch.lengths_B[index] - 1]]
        assert task.alphabet.decode(ids) == wanted
    assert task.max_length == len(task.encode(task.example("train", 0))[0]) + 1
    assert task.verify(task.example("train", 1), f"漢{end}").correct
    assert not task.verify(task.example("train", 1), "漢").correct
    path.unlink()
    assert from_dict(TaskConfig, to_dict(task.config)).build().max_length == task.max_length
    with pytest.raises(UserError, match="not both"):
        JsonlConfig(train=path, tokenizer="gpt2", alphabet=("1", "<end>"))


def test_a_chain_whose_bracket_is_joined_to_the_answer_is_still_as_long_as_its_tokens(tmp_path):
    path = write(tmp_path / "train.jsonl", row("x ", "<think>1</think>-2"))
    folder = write_pair(tmp_path / "bpe", size=50_257)
    task = JsonlConfig(train=path, tokenizer=str(folder)).build()
    example = task.example("train", 0)
    parts = [len(task.alphabet.encode(part)) for part in ("<think>1</think>", "-2<|endoftext|>")]
    assert len(task.alphabet.encode(example.answer)) < sum(parts)
    regions = task.regions(example)
    assert len(regions) == len(task.encode(example)[0]) + 1
    assert regions.count(CHAIN) == parts[0]
