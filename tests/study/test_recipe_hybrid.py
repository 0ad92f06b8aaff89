"""The recipes of the hybrid: what trains, and a small version of each, from GPT-2's weights and from a text."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tasks.vocabularies import write_pair
from trivium.config import to_dict
from trivium.data.corpora import local_sources
from trivium.data.prepare import prepare_text
from trivium.model.base import ModelContext
from trivium.model.sizing import describe, match
from trivium.study.recipe import load_recipe
from trivium.study.variants import expand
from trivium.train.groups import grouped, num_weights, set_training
from trivium.train.loop import train

RECIPE = Path(__file__).parents[2] / "recipes" / "hybrid_gpt2.yaml"
GPT2 = ModelContext(vocab_size=50_257, max_length=1024)


def test_it_has_100_million_parameters_of_which_72_million_train_or_32_without_embeddings():
    recipe = load_recipe(RECIPE)
    with torch.device("meta"):
        model = recipe.model.build(GPT2)
    sizes = num_weights(grouped(model, recipe.train))
    assert sizes["parameters"] == recipe.model.num_params(GPT2) == pytest.approx(100e6, rel=0.01)
    assert sizes["trained"] == pytest.approx(72e6, rel=0.01)
    groups = to_dict(recipe.train.groups) | {name: {"freeze": True} for name in ("embedding.*", "positions.*")}
    smaller = load_recipe(RECIPE, {"train.groups": groups})
    assert num_weights(grouped(model, smaller.train))["trained"] == pytest.approx(32e6, rel=0.01)


def test_its_groups_are_frozen_adapted_and_new_layers():
    recipe = load_recipe(RECIPE)
    with torch.device("meta"):
        model = recipe.model.build(GPT2)
    parameters = grouped(model, recipe.train)
    set_training(parameters, 0)
    rates: dict[str, set[float | None]] = {}
    for each in parameters:
        first = each.name.split(".")
        place = ".".join(first[:2]) if first[0] == "blocks" else first[0]
        rates.setdefault(place, set()).add(
            None if each.group.freeze else each.group.learning_rate or recipe.train.learning_rate
        )
    assert all(rates[f"blocks.{index}"] == {None} for index in range(4))
    assert rates["blocks.4"] == rates["embedding"] == rates["positions"] == {1e-4}
    assert all(rates[f"blocks.{index}"] == {3e-4} for index in (5, 6, 7))


def problems(path: Path, count: int) -> str:
    rows = [
        {"question": f"{path.stem} {n}+1?", "answer": f"{n}+1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_small_version_trains_from_gpt2s_weights(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    vocabulary = write_pair(tmp_path / "gpt2", size=300)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=300, n_positions=512, n_embd=24, n_layer=12, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )
    theirs.save_pretrained(vocabulary)
    source: Any = {"kind": "word_problems", "held_out": 5, "tokenizer": str(vocabulary)}
    source |= {"train": problems(tmp_path / "train.jsonl", 20), "test": problems(tmp_path / "test.jsonl", 4)}
    generated = {"kind": "arithmetic_problems", "train_examples": 10, "held_out": 2, "tokenizer": str(vocabulary)}
    changes = {
        "task.sources": {"gsm8k": {"task": source, "weight": 0.9}, "generated": {"task": generated, "weight": 0.1}},
        "model.width": 24,
        "model.heads": 2,
        "model.max_length": 512,
        "model.init_from": str(vocabulary),
        "train.steps": 3,
        "train.batch": 4,
        "train.warmup": 1,
        "train.eval_every": 1,
        "train.eval_examples": 3,
        "train.precision": "float32",
        "train.threads": 1,
        "evaluate.examples": 2,
    }
    recipe = load_recipe(RECIPE, changes)
    result = train(recipe.run, tmp_path / "run")
    assert result["step"] == 3
    assert 0 < result["trained_parameters"] < result["parameters"]
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    stored = theirs.state_dict()
    for index in range(4):  # frozen: still GPT-2's
        name = f"transformer.h.{index}.mlp.c_fc.weight"
        assert torch.equal(tensors[f"blocks.{index}.feedforward.input.weight"], stored[name].T)
    assert not torch.equal(tensors["blocks.4.feedforward.input.weight"], stored["transformer.h.4.mlp.c_fc.weight"].T)


FROM_TEXT = RECIPE.with_name("hybrid_gsm8k.yaml")


def test_the_heads_from_text_are_matched_in_parameters_and_in_flops_at_full_size():
    recipe = load_recipe(FROM_TEXT)
    assert recipe.compare is not None
    context, longest = ModelContext(vocab_size=50_257, max_length=513), 435  # GSM8K's longest problem
    attention, simplicial, wide, local = (
        dataclasses.replace(recipe.model, layers=variant["model.layers"])
        for variant in recipe.compare.variants.values()
    )
    sizes = describe(attention, context, longest)
    assert sizes["parameters"] == pytest.approx(51.2e6, rel=0.001) == describe(local, context, longest)["parameters"]
    simplicial = match(simplicial, context, parameters=int(sizes["parameters"]), length=longest)
    costs = describe(simplicial, context, longest)["flops_per_token"]
    assert costs == pytest.approx(1.39 * sizes["flops_per_token"], rel=0.01)
    wide = match(wide, context, flops=costs, length=longest)
    assert describe(wide, context, longest)["flops_per_token"] == pytest.approx(costs, rel=0.01)


def test_a_small_version_from_text_pretrains_and_answers(tmp_path: Path):
    vocabulary = write_pair(tmp_path / "vocabulary", size=300)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    prepare_text("text", local_sources(tmp_path / "book.txt"), tmp_path / "text", str(vocabulary), jobs=1)
    small = {"steps": 2, "batch": 2, "warmup": 1, "eval_every": 1, "eval_examples": 2, "precision": "float32"}
    changes: dict[str, Any] = {f"train.{key}": value for key, value in small.items()}
    changes |= {f"pretrain.train.{key}": value for key, value in small.items()}
    changes |= {
        "pretrain.train.tokens": None,
        "pretrain.task.corpus": str(tmp_path / "text"),
        "pretrain.task.length": 64,
        "pretrain.evaluate.examples": 2,
        "task.train": problems(tmp_path / "train.jsonl", 20),
        "task.test": problems(tmp_path / "test.jsonl", 3),
        "task.held_out": 5,
        "task.tokenizer": str(tmp_path / "text"),
        "model.width": 24,
        "model.heads": 2,
        "train.epochs": None,
        "train.threads": 1,
    }
    variants = {each.name: each for each in expand(load_recipe(FROM_TEXT, changes))}
    assert list(variants) == ["attention", "simplicial", "attention_flops", "local"]
    chosen = variants["simplicial"]
    assert chosen.pretraining is not None
    first = train(chosen.pretraining, tmp_path / "first")
    assert first["evaluation"]["perplexity"] > 1
    run = chosen.run(0)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, init_from=tmp_path / "first"))
    result = train(run, tmp_path / "run")
    assert result["evaluation"]["examples"] == 3
    assert set(result["evaluation"]["readings"]) == {"strict", "flexible"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"test {n}+1?\n" for n in range(3)]
