"""Byte-pair vocabularies: the same tokens as `tokenizers` gives, exact round trips, and files that are refused."""

import json
import pickle
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tasks.vocabularies import TEXT, trained, write_pair
from trivium.config import UserError
from trivium.tasks import byte_pairs, download
from trivium.tasks.byte_pairs import BytePairs, load_byte_pairs

THEIRS = trained()
OURS = BytePairs.from_tokenizers(THEIRS)
# Joins blanks with one another, so that other cuts between them are other tokens.
BLANKS = BytePairs.from_tokenizers(
    trained(400, "a\n\n\n\n\n  b\t\t\t c   d\n \n e \xa0\xa0\u3000\u3000\r\n\r\n\u2003\u2003 f" * 3)
)
WORDS = st.lists(
    st.sampled_from(["the", " The", "sum ", "it's", "  ", "\n", "12", "é", "漢", "🎉", "x", "theory", "aaa"])
)


@given(WORDS.map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=300, deadline=None)
def test_tokens_are_those_of_tokenizers_and_come_back_as_the_text(text):
    ids = OURS.encode_ordinary(text).tolist()
    assert ids == THEIRS.encode(text.replace("<|endoftext|>", "")).ids or "<|endoftext|>" in text
    assert OURS.decode(ids) == text
    assert OURS.encode(text) == THEIRS.encode(text).ids
    assert OURS.encode_many([text, TEXT, text], threads=2)[::2] == [ids, ids]


def test_merged_tokens_are_used_and_the_end_symbol_is_one_token():
    assert len(OURS.encode("the theory")) < len("the theory")
    ids = OURS.encode("the<|endoftext|>")
    assert ids[-1] == OURS.end_id == OURS.pad_id == OURS.id_of("<|endoftext|>")
    assert OURS.decode(ids) == "the<|endoftext|>"
    assert OURS.end_id not in OURS.encode_ordinary("the<|endoftext|>").tolist()
    assert OURS.decode(OURS.encode_ordinary("the<|endoftext|>")) == "the<|endoftext|>"


def test_every_byte_has_a_token_and_a_character_of_its_own():
    characters = byte_pairs.byte_characters()
    assert len(set(characters.values())) == 256
    assert (characters[ord("A")], characters[ord(" ")], characters[ord("\n")]) == ("A", "Ġ", "Ċ")
    assert [OURS.token_bytes(OURS.ids[bytes([byte])]) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert all(OURS.symbols[OURS.ids[bytes([byte])]] == "\ufffd" for byte in range(128, 256))


def test_half_a_character_is_shown_as_a_replacement_and_half_a_surrogate_pair_becomes_one():
    assert OURS.decode(OURS.encode("é")[:1]) in ("\ufffd", "é")
    assert OURS.decode(OURS.encode("a\ud800b")) == "a\ufffdb"
    assert OURS.encode_many(["a\ud800b"]) == [OURS.encode("a\ufffdb")]


def test_a_run_of_blanks_that_would_overflow_the_stack_is_encoded_as_any_other():
    text = "a" + " " * 1_500_000 + "b"
    assert OURS.decode(OURS.encode(text)) == text
    assert OURS.encode_many([text]) == [OURS.encode(text)]


def test_cutting_at_long_runs_of_blanks_changes_no_token():
    cases = ["a" + " " * one + "b" + "\n" * two + " c" for one in range(12) for two in range(12)] + [" " * 9, ""]
    wanted = [OURS.encode(case) for case in cases]
    for limit in (2, 3, 5):
        with mock.patch.object(byte_pairs, "LONG_GAP", limit):
            assert [OURS.encode(case) for case in cases] == wanted


SPACED = [*" \t\n\r\x0b\x1c\x85\xa0\u2003\u2029\u3000\u200b", "a", "'s", "7", "é", "!", "🎉"]


@given(st.lists(st.sampled_from(SPACED)))
@settings(max_examples=200, deadline=None)
def test_long_texts_which_are_marked_are_cut_like_short_ones(symbols):
    text = "".join(symbols)
    plain = BLANKS.encode_ordinary(text).tolist()
    with mock.patch.object(byte_pairs, "LONG_TEXT", 0):
        assert BLANKS.encode_ordinary(text).tolist() == plain
        assert BLANKS.decode(BLANKS.encode_ordinary(text + byte_pairs.MARK)) == text + byte_pairs.MARK


@pytest.mark.parametrize("names", byte_pairs.FILE_PAIRS)
@pytest.mark.parametrize("header", [True, False])
def test_gpt2s_files_are_read_under_both_of_their_names(tmp_path, names, header):
    made = load_byte_pairs(write_pair(tmp_path, names, header=header))
    assert (len(made), made.end_id) == (320, 319)
    assert made.decode(made.encode("some text, 12.5%")) == "some text, 12.5%"
    assert load_byte_pairs(str(tmp_path)) is made
    write_pair(tmp_path, names, size=300)
    assert len(load_byte_pairs(tmp_path)) == 300


def test_two_vocabularies_are_equal_when_their_tokens_are(tmp_path):
    one, other = write_pair(tmp_path / "a"), write_pair(tmp_path / "b", byte_pairs.FILE_PAIRS[1])
    assert load_byte_pairs(one) == load_byte_pairs(other)
    assert hash(load_byte_pairs(one)) == hash(load_byte_pairs(other))
    assert load_byte_pairs(one) != load_byte_pairs(write_pair(tmp_path / "c", size=319))
    assert load_byte_pairs(one) != "vocabulary"
    copied = pickle.loads(pickle.dumps(OURS))
    assert copied == OURS
    assert copied.encode("the sum") == OURS.encode("the sum")


def hub(folder: Path):
    """A hub whose only repository lies in `folder`."""
    return mock.patch.object(byte_pairs, "hub_file", lambda repository, name, *_: folder / name)


def test_gpt2_must_know_50257_tokens(tmp_path):
    byte_pairs._load.cache_clear()
    with hub(write_pair(tmp_path / "whole", size=50_257)):
        assert len(load_byte_pairs("gpt2")) == 50_257
    byte_pairs._load.cache_clear()
    with (
        hub(write_pair(tmp_path / "cut", size=50_256)),
        pytest.raises(UserError, match="50256 tokens where GPT-2 has 5"),
    ):
        load_byte_pairs("gpt2")
    byte_pairs._load.cache_clear()


def test_without_a_network_the_files_to_place_are_named():
    byte_pairs._load.cache_clear()
    with (
        mock.patch("huggingface_hub.hf_hub_download", side_effect=OSError("no route to host")),
        mock.patch("trivium.tasks.download.unreachable", return_value=None),
        pytest.raises(UserError) as error,
    ):
        load_byte_pairs("gpt2")
    assert str(error.value) == (
        "gpt2: vocab.json cannot be had from the Hugging Face hub (no route to host); "
        "without a network, give a folder that holds vocab.json and merges.txt"
    )


def test_without_the_extra_the_pip_command_is_told():
    with (
        mock.patch.object(download.importlib.util, "find_spec", return_value=None),
        pytest.raises(UserError, match=r"pip install 'trivium\[hf\]'"),
    ):
        BytePairs(OURS.ids, OURS.merges, OURS.specials).encode("text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vocabulary, merges: (dict(list(vocabulary.items())[-1:]), []), "not 0, 1, 2"),
        (lambda vocabulary, merges: ({"<|endoftext|>": 0}, []), "256 of the 256 single bytes"),
        (lambda vocabulary, merges: (vocabulary, merges[:-1]), "not the 256 bytes and what 62 merges make"),
        (lambda vocabulary, merges: (vocabulary, [*merges, "Ā ĀĀĀ"]), "pieces without an id"),
        (lambda vocabulary, merges: (vocabulary, merges[::-1]), "in the order of the merges"),
        (lambda vocabulary, merges: (vocabulary, [*merges, "a b c"]), "values to unpack"),
        (lambda vocabulary, merges: (vocabulary | {"a漢": 320}, merges), "'漢' stands for no byte"),
        (
            lambda vocabulary, merges: ({k: v for k, v in vocabulary.items() if v < 319}, merges),
            "not among its special",
        ),
        (lambda vocabulary, merges: ([1, 2], merges), "tokenizer"),
        (lambda vocabulary, merges: (vocabulary | {"Ā": "x"}, merges), "invalid literal"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, change, message):
    write_pair(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocabulary, merges = change(vocabulary, merges)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        load_byte_pairs(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_other_places_are_refused_by_name(tmp_path):
    for place, message in (
        (tmp_path, "holds no tokenizer"),
        ("/no/such/place", "no such folder"),
        ("", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_byte_pairs(place)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_byte_pairs(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel"}, "pre_tokenizer": None}))
    with pytest.raises(UserError, match="expected byte-level BPE like GPT-2's"):
        load_byte_pairs(tmp_path)
