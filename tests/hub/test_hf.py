"""Every registered model behind the interface of transformers; beside each check its twin, a planted bug."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import trivium
from tests.hub import hf_checks as checks
from tests.hub.models import BLOCK, TASK, load, make
from tests.tasks.vocabularies import write_pair
from trivium.config import UserError
from trivium.hub import StateCache, TriviumForCausalLM, hf
from trivium.model.base import MODELS, Decoding, ModelConfig
from trivium.model.decoder import DecoderConfig
from trivium.model.folder import load_model, save_model
from trivium.model.positions import Positions
from trivium.tasks.group_words import GroupWordsConfig
from trivium.tasks.jsonl import JsonlConfig

DOCS = Path(__file__).parents[2] / "docs" / "hub.md"
EXAMPLES = [example for name in MODELS.names() for example in MODELS.get(name).examples()]


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: f"{config.kind}{EXAMPLES.index(config)}")
def test_a_model_is_the_same_in_transformers(config: ModelConfig, tmp_path: Path):
    model = make(config, tmp_path)
    checks.check_logits(model, tmp_path)
    checks.check_padding(model, tmp_path)
    checks.check_generation(model, tmp_path)


def test_the_checks_catch_buffers_that_nobody_fills(tmp_path: Path):
    model = make(BLOCK, tmp_path)
    with (
        mock.patch.object(Positions, "reset_buffers", lambda self: self.digit_V.zero_()),
        pytest.raises(AssertionError),
    ):
        checks.check_logits(model, tmp_path)


def test_the_checks_catch_a_tensor_under_another_name(tmp_path: Path):
    model = make(DecoderConfig(width=16, heads=2), tmp_path)
    (first, *_) = (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
    with torch.no_grad():
        first.weight.mul_(1.001)
    with pytest.raises(AssertionError):
        checks.check_logits(model, tmp_path)


@pytest.mark.parametrize("check", [checks.check_padding, checks.check_generation])
def test_the_checks_catch_padding_that_is_read(check: Any, tmp_path: Path):
    model = make(BLOCK, tmp_path)
    whole = hf._Aligned.of
    with mock.patch.object(hf._Aligned, "of", lambda mask: whole(torch.ones_like(mask))), pytest.raises(AssertionError):
        check(model, tmp_path)


def test_the_checks_catch_a_cache_that_beams_do_not_reorder(tmp_path: Path):
    model = make(BLOCK, tmp_path)
    with (
        mock.patch.object(StateCache, "reorder_cache", return_value=None),
        pytest.raises(AssertionError, match="num_beams"),
    ):
        checks.check_generation(model, tmp_path)


def test_a_prompt_of_text_is_answered_as_our_own_chat_answers_it(folder: Path):
    theirs, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["12+34=", "1+2="], return_tensors="pt", padding=True)
    assert inputs["attention_mask"].tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    found = theirs.generate(**inputs, max_new_tokens=4)
    model, ours, task = load_model(folder)
    for row, prompt in zip(found, ("12+34=", "1+2="), strict=True):
        (wanted,) = trivium.generate.engine.generate(
            model, [ours.encode(prompt)], end_id=task.alphabet.end_id, max_new_tokens=4
        )
        text = tokenizer.decode(row[inputs["input_ids"].shape[1] :])
        assert text.rstrip("<end>").startswith(ours.decode(wanted.tokens).rstrip("<end>"))


def test_the_example_of_the_docs_runs(folder: Path):
    (text,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), flags=re.S | re.M)
    names: dict[str, Any] = {"folder": folder}
    exec(text, names)
    assert [answer.lstrip("<end>")[:3] for answer in names["text"]] == ["12+", "5+7"]


def test_labels_give_the_loss_of_the_next_token_and_gradients(folder: Path):
    theirs, tokens = load(folder), torch.randint(13, (3, 8))
    labels = tokens.clone()
    labels[0, :4] = -100
    output = theirs(tokens, labels=labels)
    logits, _ = theirs.model(tokens)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, wanted)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())
    counted = theirs(tokens, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(counted * 10, wanted * int((labels[:, 1:] != -100).sum()))


def test_padding_is_left_out_of_the_loss(folder: Path):
    theirs = load(folder)
    rows = checks.random_rows(theirs.model, [6, 3])
    tokens, mask = checks.left_padded(rows, pad=2)
    one, other = (theirs(row[None], labels=row[None]).loss for row in rows)
    together = theirs(tokens, attention_mask=mask, labels=tokens).loss
    torch.testing.assert_close(together, (5 * one + 2 * other) / 7)


def test_a_mask_may_also_leave_out_the_right_or_the_middle(folder: Path):
    theirs, tokens = load(folder), torch.randint(13, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]])
    logits = theirs(tokens, attention_mask=mask).logits
    for b in range(2):
        alone = theirs(tokens[b][mask[b].bool()][None]).logits[0]
        torch.testing.assert_close(logits[b][mask[b].bool()], alone)
        assert not logits[b][~mask[b].bool()].any()


def test_a_row_that_is_padding_alone_leaves_the_others_as_they_are(folder: Path):
    theirs, tokens = load(folder), torch.randint(13, (2, 5))
    mask = torch.tensor([[0] * 5, [1] * 5])
    logits = theirs(tokens, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[1], theirs(tokens[1:]).logits[0])


def test_a_conversation_goes_on_from_the_cache_that_generate_returns(folder: Path):
    theirs, tokens = load(folder), torch.randint(13, (1, 3))

    def go_on(tokens: torch.Tensor, count: int, **options: Any) -> Any:
        mask = torch.ones_like(tokens)  # transformers would take pad symbols in the text for padding
        return theirs.generate(tokens, attention_mask=mask, max_new_tokens=count, eos_token_id=None, **options)

    first = go_on(tokens, 3, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 5
    more = go_on(first.sequences, 3, past_key_values=first.past_key_values)
    assert more.tolist() == go_on(tokens, 6).tolist()


def test_several_answers_to_one_prompt_are_drawn(folder: Path):
    theirs = load(folder)
    torch.manual_seed(0)
    found = theirs.generate(torch.tensor([[1, 2, 3]]), do_sample=True, num_return_sequences=20, max_new_tokens=3)
    assert len(found) == 20
    assert len(set(map(tuple, found.tolist()))) > 1


def test_more_tokens_than_the_model_can_read_are_refused(folder: Path):
    theirs = load(folder)
    with pytest.raises(ValueError, match="this model reads at most 13"):
        theirs.generate(torch.ones(1, 10, dtype=torch.int64), max_new_tokens=9, eos_token_id=None)
    # Padding takes no room.
    tokens = torch.ones(2, 14, dtype=torch.int64)
    mask = torch.cat((torch.zeros(2, 8), torch.ones(2, 6)), dim=1).long()
    found = theirs.generate(tokens, attention_mask=mask, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    assert found.shape == (2, 18)


def test_what_a_trivium_model_has_not_is_refused_by_name(folder: Path):
    theirs, tokens = load(folder), torch.ones(2, 4, dtype=torch.int64)
    for options, message in (
        ({"output_attentions": True}, "has no output_attentions"),
        ({"past_key_values": DynamicCache()}, "is a DynamicCache"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask is \(2, 5\), expected \(2, 4\)"),
        ({"labels": tokens[:, :3]}, "labels are"),
        ({"labels": tokens, "logits_to_keep": 1}, "all places"),
    ):
        with pytest.raises(ValueError, match=message):
            theirs(tokens, **options)
    with pytest.raises(ValueError, match="input_ids are"):
        theirs(tokens[0])
    cache = theirs(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows, input_ids has 1"):
        theirs(tokens[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cannot be resized"):
        theirs.resize_token_embeddings(99)
    assert theirs.resize_token_embeddings(13) is theirs.get_input_embeddings()
    with pytest.raises(ValueError, match="safetensors only"):
        load(folder, use_safetensors=False)


def test_a_cache_can_be_emptied_and_used_again(folder: Path):
    theirs, tokens = load(folder), torch.randint(13, (2, 4))
    with torch.no_grad():
        output = theirs(tokens, use_cache=True)
        cache, wanted = output.past_key_values, output.logits.clone()
        assert (cache.get_seq_length(), cache.get_max_length(), cache.batch_size) == (4, 13, 2)
        cache.reset()
        torch.testing.assert_close(theirs(tokens, past_key_values=cache).logits, wanted)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3]))
        one = theirs(tokens[1:, :2], past_key_values=cache).logits
        torch.testing.assert_close(one, theirs(torch.cat((tokens[1:], tokens[1:, :2]), dim=1)).logits[:, 4:])


def test_models_that_do_not_predict_the_next_token_refuse_to_generate_and_still_give_logits(tmp_path: Path):
    model = make(BLOCK, tmp_path / "one")
    model.decoding = Decoding(shift=1)
    save_model(tmp_path / "one", model, TASK)
    theirs, tokens = load(tmp_path / "one"), torch.randint(13, (2, 6))
    with pytest.raises(UserError, match="2 tokens ahead"):
        theirs.generate(tokens)
    logits = theirs(tokens).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-2].flatten(0, 1), tokens[:, 2:].flatten())
    torch.testing.assert_close(theirs(tokens, labels=tokens).loss, wanted)

    words = GroupWordsConfig()
    save_model(tmp_path / "words", trivium.build(DecoderConfig(width=16, heads=2), words), words)
    for older in (False, True):
        if older:
            described = json.loads((tmp_path / "words" / "config.json").read_text())
            del described["labels"]
            (tmp_path / "words" / "config.json").write_text(json.dumps(described))
        theirs = load(tmp_path / "words")
        with pytest.raises(UserError, match="labels the tokens that it reads"):
            theirs.generate(tokens)
    theirs = load(tmp_path / "words")
    save_model(tmp_path / "words", theirs.model, words)
    theirs = load(tmp_path / "words")
    tokens = torch.randint(theirs.config.vocab_size, (2, 4))
    wanted = torch.nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(theirs(tokens, labels=tokens).loss, wanted)


def test_precision_and_place_are_those_asked_for(folder: Path):
    assert load(folder).dtype == torch.float32
    half = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape[1] <= 5
    half.save_pretrained(folder / "half")
    assert load(folder / "half").dtype == torch.bfloat16
    assert next(load_model(folder / "half")[0].parameters()).dtype == torch.bfloat16
    for place in ("cpu", "auto", {"": "cpu"}):
        assert load(folder, device_map=place).device.type == "cpu"


def test_weights_in_several_files_load_here_and_there(folder: Path):
    theirs, tokens = load(folder), torch.randint(13, (1, 5))
    theirs.save_pretrained(folder / "parts", max_shard_size="4KB")
    assert len(list((folder / "parts").glob("*.safetensors"))) > 1
    assert torch.equal(load(folder / "parts")(tokens).logits, theirs(tokens).logits)
    assert torch.equal(load_model(folder / "parts")[0](tokens)[0], theirs(tokens).logits)
    (folder / "parts" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(folder / "parts")


def test_weights_that_are_not_the_configs_are_refused(folder: Path):
    described = json.loads((folder / "config.json").read_text())
    described["model"]["layers"] = "attention(window=3)*1"
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="unexpected keys"):
        load(folder)
    described["model"]["layers"] = "attention(window=3)*1 + gla*1 + attention"
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="missing keys"):
        load(folder)


def test_the_tokenizer_that_transformers_saves_is_read_here(folder: Path):
    load(folder).save_pretrained(folder / "theirs")
    ours = load_model(folder / "theirs")[1]
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "theirs")
    assert load_model(folder / "theirs")[1] == ours == load_model(folder)[1]
    assert AutoTokenizer.from_pretrained(folder / "theirs").padding_side == "left"


def test_a_model_that_reads_byte_pairs_generates_text(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "one and ", "answer": "two"}) + "\n")
    task = JsonlConfig(train=tmp_path / "train.jsonl", tokenizer=str(write_pair(tmp_path / "pairs")), max_length=30)
    save_model(tmp_path / "model", trivium.build(DecoderConfig(width=16, heads=2), task), task)
    theirs, tokenizer = load(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    found = theirs.generate(**tokenizer("one and ", return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.decode(found[0]).startswith("one and ")
    theirs.save_pretrained(tmp_path / "again")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_model(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again")[1] == load_model(tmp_path / "model")[1]


def test_registration_needs_no_trust_in_remote_code_and_comes_with_the_import(folder: Path):
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "trivium"
    assert isinstance(AutoModelForCausalLM.from_config(config), TriviumForCausalLM)
    assert not list(folder.glob("*.py"))


def test_the_core_imports_without_transformers_and_the_door_then_names_the_command():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import trivium, trivium.train.loop, trivium.commands.export\n"
        "try:\n    import trivium.hub\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (
        done.stdout == "trivium.hub needs transformers, which is not installed; pip install 'trivium[hf]' brings it\n"
    )
