"""GPT-2's weights: the logits of transformers' own GPT-2, and what does not fit."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests.tasks.vocabularies import write_pair
from trivium.config import UserError, from_dict
from trivium.hub import gpt2
from trivium.hub.gpt2 import check_gpt2, find_gpt2, load_gpt2
from trivium.model.base import MODELS, ModelContext
from trivium.model.decoder import Decoder, DecoderConfig
from trivium.model.folder import load_model
from trivium.model.presets import PRESETS
from trivium.train.config import RunConfig
from trivium.train.loop import train
from trivium.train.prepare import prepare

SIZES: dict[str, Any] = {"n_layer": 3, "n_embd": 24, "n_head": 3, "vocab_size": 320, "n_positions": 40}
SHAPE: dict[str, Any] = {"width": 24, "heads": 3, "feedforward": "gelu_new", "layers": "attention(bias=true)*3"}
CONTEXT = ModelContext(vocab_size=320, max_length=30)


def write_gpt2(folder: Path) -> GPT2LMHeadModel:
    """Save a GPT-2 whose norms and biases are not 1 and 0."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=319, eos_token_id=319)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_gpt2(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def build(folder: Path, **options: Any) -> tuple[Decoder, list[str]]:
    model = DecoderConfig(**{**SHAPE, **options}).build(CONTEXT).eval()
    return model, load_gpt2(find_gpt2(str(folder)), model)


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


@torch.no_grad()
def difference(ours: Decoder, theirs: GPT2LMHeadModel) -> float:
    tokens = torch.randint(320, (2, 30), generator=torch.Generator().manual_seed(1))
    return float((ours(tokens)[0] - theirs(tokens).logits).abs().max())


def check_equal(ours: Decoder, theirs: GPT2LMHeadModel) -> None:
    assert difference(ours, theirs) < 1e-4


def without_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors: dict[str, Any]) -> dict[str, Any]:
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 40, 40) for layer in range(3)}
    masks |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}
    return tensors | masks | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


@pytest.mark.parametrize("change", [dict, without_prefix, with_masks])
def test_logits_are_those_of_transformers_gpt2(tmp_path, change):
    theirs = write_gpt2(tmp_path)
    edit(tmp_path, change)
    ours, own = build(tmp_path)
    assert own == []
    check_equal(ours, theirs)
    untied, own = build(tmp_path, tied=False)
    assert own == []
    check_equal(untied, theirs)


@pytest.mark.parametrize("mistake", ["no transpose", "other rows", "other position"])
def test_the_comparison_catches_weights_that_are_put_wrongly(tmp_path, mistake):
    theirs = write_gpt2(tmp_path)
    ours, _ = build(tmp_path)
    with torch.no_grad():
        if mistake == "no transpose":
            weight = ours.blocks[1].mixer.out.weight  # square, so that nothing else would tell
            weight.copy_(weight.T.clone())
        elif mistake == "other rows":
            weight = ours.blocks[0].mixer.qkv.weight
            weight.copy_(weight.roll(24, dims=0))
        else:
            ours.positions.table.weight.copy_(ours.positions.table.weight.roll(1, dims=0))
    with pytest.raises(AssertionError):
        check_equal(ours, theirs)


def test_fewer_blocks_are_the_first_layers(tmp_path):
    theirs = write_gpt2(tmp_path)
    ours, own = build(tmp_path, layers="attention(bias=true)*2")
    assert own == []
    del theirs.transformer.h[2]
    check_equal(ours, theirs)


def test_another_mixer_keeps_its_own_start_and_its_block_takes_the_rest(tmp_path):
    write_gpt2(tmp_path)
    layers = "attention(bias=true)*2 + gla*1"
    torch.manual_seed(5)
    fresh = DecoderConfig(**{**SHAPE, "layers": layers}).build(CONTEXT)
    torch.manual_seed(5)
    ours, own = build(tmp_path, layers=layers)
    assert own
    assert all(name.startswith("blocks.2.mixer.") for name in own)
    start, tensors = fresh.state_dict(), load_file(tmp_path / "model.safetensors")
    for name in own:
        assert torch.equal(ours.state_dict()[name], start[name])
    found = ours.blocks[2].feedforward.input.weight
    assert torch.equal(found, tensors["transformer.h.2.mlp.c_fc.weight"].T)


def test_weights_are_taken_in_the_models_own_precision(folder):
    model = DecoderConfig(**SHAPE).build(CONTEXT).to(torch.bfloat16)
    load_gpt2(find_gpt2(str(folder)), model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 48, "heads": 3}, "model.width: 48 does not fit .* allowed: 24"),
        ({"heads": 2}, "model.heads: 2 does not fit .* allowed: 3"),
        ({"positions": "rotary"}, "model.positions: rotary does not fit .* allowed: learned"),
        ({"norm": "rmsnorm"}, "model.norm: rmsnorm does not fit"),
        ({"feedforward": "gelu"}, "model.feedforward: gelu does not fit .* allowed: gelu_new"),
        ({"ff_width": 50}, "model.ff_width: 50 does not fit .* allowed: 96"),
        ({"layers": "attention(bias=true)*4"}, "model.layers: 4 blocks, .* has 3"),
        ({"layers": "attention*3"}, "attention of block 0 cannot hold"),
        ({"layers": "attention(bias=true)*2 + attention(bias=true,kv_heads=1)"}, "attention of block 2 cannot hold"),
        ({"max_length": 41}, "model.max_length: 41 is longer than the position table .* allowed: up to 40"),
    ],
)
def test_a_model_that_cannot_hold_the_weights_is_refused_by_the_field(folder, options, message):
    config = DecoderConfig(**{**SHAPE, **options})
    with pytest.raises(UserError, match=message):
        check_gpt2(find_gpt2(str(folder)), config, CONTEXT)


def test_another_vocabulary_is_refused(folder):
    with pytest.raises(UserError, match=r"its vocabulary has 13 tokens, the weights of .* 320"):
        check_gpt2(find_gpt2(str(folder)), DecoderConfig(**SHAPE), ModelContext(13, 30))


def change_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "is a pickle, .* never loaded",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights; allowed: model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "damaged or not a safetensors file"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (change_config(model_type="bert"), "model_type is 'bert'; allowed: 'gpt2'"),
        (change_config(activation_function="relu"), "activation_function is 'relu'; allowed: 'gelu_new'"),
        (change_config(n_embd=32), "tensors are of n_embd 24, config.json says 32"),
        (change_config(vocab_size=50_257), "tensors are of vocab_size 320, config.json says 50257"),
        (change_config(scale_attn_by_inverse_layer_idx=True), "allowed: False, as in GPT-2"),
        (lambda folder: edit(folder, lambda t: t | {"extra": torch.zeros(1)}), "unknown tensor extra"),
        (
            lambda folder: edit(folder, lambda t: {n: v for n, v in t.items() if "h.1.ln_2.bias" not in n}),
            "lacks h.1.ln_2",
        ),
        (lambda folder: edit(folder, lambda t: {n: v for n, v in t.items() if "wpe" not in n}), "lacks wpe.weight"),
        (
            lambda folder: edit(folder, lambda t: t | {"transformer.h.0.ln_1.bias": torch.zeros(5)}),
            r"\(5,\) where the model's",
        ),
    ],
)
def test_a_folder_that_is_not_gpt2s_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        build(folder)
    assert str(folder) in str(error.value)


def test_a_folder_without_a_config_has_heads_of_64(tmp_path):
    write_gpt2(tmp_path)
    (tmp_path / "config.json").unlink()
    assert find_gpt2(str(tmp_path)).heads == 1


def test_the_hubs_name_is_looked_up_there_and_without_a_network_the_files_are_named(folder):
    with mock.patch.object(gpt2, "hub_file", lambda repository, name, *_: folder / name):
        assert find_gpt2("gpt2").layers == 3
    with (
        mock.patch("huggingface_hub.hf_hub_download", side_effect=OSError("no route to host")),
        mock.patch("trivium.tasks.download.unreachable", return_value=None),
        pytest.raises(
            UserError, match=r"no route to host\); without a network, give a folder that holds its model.safet"
        ),
    ):
        find_gpt2("gpt2")
    with pytest.raises(UserError, match="no such folder, nor the name of a hub repository"):
        find_gpt2("/no/such")


def test_the_preset_is_gpt2_small():
    config = DecoderConfig(preset="gpt2", max_length=1024)
    assert config.num_params(ModelContext(50_257, 1024)) == 124_439_808
    assert PRESETS["gpt2"]["width"] // PRESETS["gpt2"]["heads"] == gpt2.HEAD_WIDTH


def recipe(folder: Path, tmp_path: Path, **model: Any) -> RunConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} and ", "answer": f"{n + 1}"}) + "\n" for n in range(20)))
    tests = tmp_path / "tests.jsonl"
    tests.write_text(json.dumps({"prompt": "what? ", "answer": "one"}) + "\n")
    task = {"kind": "jsonl", "train": str(rows), "validation": None, "test": str(tests)}
    task |= {"validation": str(tmp_path / "val.jsonl"), "tokenizer": str(write_pair(tmp_path / "pairs"))}
    (tmp_path / "val.jsonl").write_text(json.dumps({"prompt": "who? ", "answer": "me"}) + "\n")
    layers = {"layers": "attention(bias=true)*2 + gla*1", "init_from": str(folder)}
    plain = {"steps": 2, "batch": 4, "learning_rate": 1e-12, "weight_decay": 0.0, "precision": "float32", "threads": 1}
    return from_dict(
        RunConfig,
        {"task": task, "model": {**SHAPE, **layers, **model}, "train": plain, "evaluate": {"examples": 1}},
    )


def test_a_run_begins_with_the_weights_that_its_recipe_names(folder, tmp_path):
    train(recipe(folder, tmp_path), tmp_path / "run")
    model, tokenizer, _ = load_model(tmp_path / "run" / "model")
    tensors = load_file(folder / "model.safetensors")
    torch.testing.assert_close(model.embedding.weight, tensors["transformer.wte.weight"], rtol=0, atol=1e-8)
    torch.testing.assert_close(
        model.blocks[1].mixer.qkv.weight, tensors["transformer.h.1.attn.c_attn.weight"].T, rtol=0, atol=1e-8
    )
    assert len(tokenizer) == 320


def test_a_recipe_that_cannot_begin_so_is_refused_before_anything_is_written(folder, tmp_path):
    with pytest.raises(UserError, match=r"model.layers: 4 blocks"):
        prepare(recipe(folder, tmp_path, layers="attention(bias=true)*4"))
    with pytest.raises(UserError, match="a model of kind prefix_scan has no GPT-2 weights"):
        check_gpt2(find_gpt2(str(folder)), MODELS.get("prefix_scan").examples()[0], CONTEXT)
