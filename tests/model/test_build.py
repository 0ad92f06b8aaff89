import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import trivium
from trivium.config import UserError
from trivium.model.base import ModelContext
from trivium.model.context import model_context
from trivium.model.decoder import Decoder, DecoderConfig
from trivium.tasks.addition import AdditionConfig

TASK = AdditionConfig(max_digits=2)
MODEL = DecoderConfig(width=24, heads=2, positions="block")


def test_a_recipe_a_run_and_a_model_config_build_the_same_model():
    recipe = {
        "task": {"kind": "addition", "max_digits": 2},
        "model": {"width": 24, "heads": 2, "positions": "block"},
        "train": {"steps": 3},
    }
    built = [
        trivium.build(recipe),
        trivium.build(SimpleNamespace(task=TASK, model=MODEL)),
        trivium.build(MODEL, TASK),
        trivium.build(recipe["model"], model_context(TASK.build(), MODEL)),
    ]
    for model in built:
        assert isinstance(model, Decoder)
        assert model.config == MODEL
        assert model.context == built[0].context


def test_the_context_is_the_tasks():
    task = TASK.build()
    context = model_context(task, MODEL)
    assert context == ModelContext(
        len(task.alphabet), task.max_length, task.alphabet.digit_ids, task.least_first, (task.alphabet.id_of("+"),)
    )
    longer = DecoderConfig(max_length=50)
    assert model_context(task, longer).max_length == 50
    assert longer.build(model_context(task, longer)).init_state(1).mixers[0].tensors()[1].shape[1] == 50


def test_asking_for_the_context_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    model_context(TASK.build(), MODEL)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_shorter_than_the_task_is_refused():
    with pytest.raises(UserError, match=r"model.max_length: 3 is shorter than the task's longest sequence"):
        model_context(TASK.build(), DecoderConfig(max_length=3))


def test_a_mixer_that_does_not_fit_is_refused_before_anything_is_built():
    with pytest.raises(UserError, match=r"model.layers: attention: kv_heads"):
        model_context(TASK.build(), DecoderConfig(layers="attention(kv_heads=3)"))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model": {}}, "task: missing"),
        ({"task": {"kind": "addition"}, "modle": {}}, "modle: unknown section; did you mean 'model'"),
        ({"task": {"kind": "additon"}}, "task: unknown task 'additon'"),
        ({"task": {"kind": "addition"}, "model": {"kind": "decodr"}}, "model: unknown model 'decodr'"),
        (3, "cannot build a model from int"),
        (MODEL, "cannot build a model from DecoderConfig"),
    ],
)
def test_what_describes_no_model_is_refused(config, problem):
    with pytest.raises(UserError) as caught:
        trivium.build(config)
    assert str(caught.value).startswith(problem)


def test_neither_importing_trivium_nor_describing_a_model_waits_for_what_it_does_not_use():
    code = (
        "import sys, trivium; assert not {'torch', 'numpy', 'yaml'} & set(sys.modules), 'imported';"
        "assert {'build', 'load', 'ops'} <= set(dir(trivium));"
        "assert callable(trivium.build) and callable(trivium.load) and trivium.ops.__name__ == 'trivium.ops';"
        "from trivium.model.decoder import DecoderConfig; "
        "DecoderConfig(layers='attention + simplicial', backends={'simplicial': 'reference'}); "
        "assert not {'torch._dynamo', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="biuld"):
        trivium.biuld  # noqa: B018
