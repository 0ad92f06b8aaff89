"""Tokenizer files: the same ids here, in `tokenizers` and in `transformers`."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tasks.vocabularies import TEXT, trained, write_pair
from trivium.config import UserError
from trivium.data.tokenizers import BytePairTokenizer, CharacterTokenizer, load_tokenizer, tokenizer_of
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.byte_pairs import BytePairs, load_byte_pairs

ODD = Alphabet(("1", "0", "<", "end", "<end>", " ", "\n", "é", "Ж", "<pad>", "'"), ("0", "1"), pad="<pad>")
ALPHABETS = [config.build().alphabet for config in AdditionConfig.examples()] + [ODD]


@pytest.mark.parametrize("alphabet", ALPHABETS, ids=lambda alphabet: f"{len(alphabet)} symbols")
def test_tokenizers_and_transformers_give_the_same_ids(alphabet, tmp_path):
    ours = CharacterTokenizer(alphabet)
    ours.save(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    texts = ["".join(alphabet.symbols[index] for index in rng.integers(len(alphabet), size=30)) for _ in range(40)]
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids
        assert fast(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids) == text
    assert theirs.get_vocab_size() == len(fast) == len(ours) == len(alphabet)
    assert (fast.eos_token_id, fast.pad_token_id) == (alphabet.end_id, alphabet.pad_id)


def test_a_worked_chain_has_equal_ids_everywhere(tmp_path):
    task = AdditionConfig(format="column").build()
    CharacterTokenizer(task.alphabet).save(tmp_path)
    text = task.render(99, 21)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert ids == task.alphabet.encode(text)
    assert len(ids) == len("99+21=") + 1 + len("9+1=10 9+2+1=12") + 1 + len("120") + 1


def test_foreign_characters_are_refused_here_and_there(tmp_path):
    ours = CharacterTokenizer(AdditionConfig(format="plain").build().alphabet)
    ours.save(tmp_path)
    with pytest.raises(UserError, match="'x'"):
        ours.encode("1x")
    with pytest.raises(Exception, match="UNK"):
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("1x")


@given(st.lists(st.integers(0, len(ODD) - 1)))
def test_ids_and_text_are_inverse_up_to_the_longest_symbol(ids):
    tokenizer = CharacterTokenizer(ODD)
    text = tokenizer.decode(ids)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("alphabet", ALPHABETS, ids=lambda alphabet: f"{len(alphabet)} symbols")
def test_a_saved_tokenizer_is_loaded_whole(alphabet, tmp_path):
    CharacterTokenizer(alphabet).save(tmp_path)
    assert CharacterTokenizer.load(tmp_path) == CharacterTokenizer(alphabet)


def test_a_folder_without_our_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        CharacterTokenizer.load(tmp_path)
    CharacterTokenizer(ODD).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(UserError, match="not written by Trivium"):
        CharacterTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        CharacterTokenizer.load(tmp_path)


PAIRS = BytePairs.from_tokenizers(trained())


@pytest.mark.parametrize("vocabulary", [PAIRS, "gpt2"], ids=["trained", "gpt2 files"])
def test_byte_pairs_have_equal_ids_here_in_tokenizers_and_in_transformers(vocabulary, tmp_path):
    if vocabulary == "gpt2":
        vocabulary = load_byte_pairs(write_pair(tmp_path / "files", size=900))
    ours = tokenizer_of(vocabulary)
    ours.save(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "the 漢字<|endoftext|>é", " ", "", "<|endoftext|><|endoftext|>", "it's\r\n\t 12"):
        ids = ours.encode(text)
        assert theirs.encode(text).ids == fast(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=False) == fast.decode(ids) == ours.decode(ids) == text
    assert len(fast) == theirs.get_vocab_size() == len(ours)
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (vocabulary.end_id,) * 3
    assert fast.padding_side == "left"
    assert load_tokenizer(tmp_path) == ours == BytePairTokenizer.load(tmp_path)


@pytest.mark.parametrize("alphabet", ALPHABETS, ids=lambda alphabet: f"{len(alphabet)} symbols")
def test_the_automatic_tokenizer_pads_on_the_left_and_keeps_specials_whole(alphabet, tmp_path):
    CharacterTokenizer(alphabet).save(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    rows = ["".join(alphabet.symbols[::-1]), alphabet.symbols[0]]
    batch = fast(rows, padding=True)
    assert fast.decode(batch["input_ids"][0]) == rows[0]
    assert batch["input_ids"][1] == [alphabet.pad_id] * (len(alphabet) - 1) + [0]
    assert batch["attention_mask"][1] == [0] * (len(alphabet) - 1) + [1]
    assert fast.convert_tokens_to_ids(list(alphabet.symbols)) == list(range(len(alphabet)))
    assert load_tokenizer(tmp_path) == CharacterTokenizer(alphabet)
