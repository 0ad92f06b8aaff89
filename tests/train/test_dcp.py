"""Another trainer's distributed checkpoint becomes a model folder, once its pickle is trusted."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import trivium
from tests.train.tiny import tiny_config
from trivium import cli
from trivium.config import UserError, to_yaml
from trivium.model.base import MODELS
from trivium.model.folder import load_model
from trivium.tasks.addition import AdditionConfig
from trivium.train.config import RunConfig
from trivium.train.dcp import model_of_dcp

CONFIG = tiny_config()


def write(folder: Path, model: torch.nn.Module, wrap: Any = lambda tensors: {"model": tensors, "step": 7}) -> Path:
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.save(wrap(model.state_dict()), checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    return trivium.build(CONFIG).eval()


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda tensors: {"model": tensors, "optimizer": {"state": {"embedding.weight": torch.zeros(2)}}, "step": 7},
        lambda tensors: {"app": {"_orig_mod": tensors}},
    ],
)
def test_the_weights_are_found_under_whatever_name_they_were_saved(tmp_path, model, wrap):
    folder = write(tmp_path / "dcp", model, wrap)
    found, task = model_of_dcp(folder, CONFIG, trust_pickle=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert task.config == CONFIG.task
    assert not found.training


@pytest.mark.parametrize("name", MODELS.names())
def test_every_kind_of_model_is_converted_in_the_precision_that_it_has(tmp_path, name):
    config = RunConfig(task=AdditionConfig(max_digits=2), model=MODELS.get(name).examples()[0])
    model = trivium.build(config).to(torch.bfloat16)
    found, _ = model_of_dcp(write(tmp_path / "dcp", model), config, trust_pickle=True)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_read_before_it_is_trusted(tmp_path, model):
    folder = write(tmp_path / "dcp", model)
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "harm")))
    with pytest.raises(UserError, match="is a pickle, which can run any code when it is read; add --trust-pickle"):
        model_of_dcp(folder, CONFIG, trust_pickle=False)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(UserError, match="damaged or not DCP's"):
        model_of_dcp(folder, CONFIG, trust_pickle=True)
    assert (tmp_path / "harm").exists()  # so that the test above can fail


def test_a_folder_that_does_not_hold_the_model_is_refused(tmp_path, model):
    folder = write(tmp_path / "dcp", model)
    with pytest.raises(UserError, match=r"has no \.metadata"):
        model_of_dcp(tmp_path, CONFIG, trust_pickle=True)
    with pytest.raises(UserError, match=r"it lacks model\.blocks\.2\.norm1\.weight; it holds"):
        model_of_dcp(folder, tiny_config({"layers": "attention*3"}), trust_pickle=True)
    with pytest.raises(UserError, match=r"model\.embedding\.weight is \(13, 16\), the model's is \(13, 32\)"):
        model_of_dcp(folder, tiny_config({"width": 32}), trust_pickle=True)
    with pytest.raises(UserError, match=r"it lacks ema\.embedding\.weight"):
        model_of_dcp(folder, CONFIG, trust_pickle=True, prefix="ema.")
    (folder / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        model_of_dcp(folder, CONFIG, trust_pickle=True)


def test_of_two_copies_one_is_named(tmp_path, model):
    other = trivium.build(CONFIG)
    tensors = {"ema": other.state_dict()}
    folder = write(tmp_path / "dcp", model, lambda own: {"model": own, **tensors})
    with pytest.raises(UserError, match=r"--prefix: .* more than once; allowed: '(ema|model).', '(ema|model).'"):
        model_of_dcp(folder, CONFIG, trust_pickle=True)
    found, _ = model_of_dcp(folder, CONFIG, trust_pickle=True, prefix="ema.")
    assert torch.equal(found.state_dict()["embedding.weight"], other.state_dict()["embedding.weight"])


def test_the_command_converts_says_what_is_missing_and_writes_nothing_before(tmp_path, model, capsys):
    folder, recipe, out = write(tmp_path / "dcp", model), tmp_path / "recipe.yaml", tmp_path / "model"
    recipe.write_text(to_yaml(CONFIG))
    for words, message in (
        (["--from-dcp"], "--recipe: missing"),
        (["--from-dcp", "--recipe", str(recipe)], "add --trust-pickle"),
        (["--trust-pickle"], "--trust-pickle: belongs to --from-dcp"),
        (["--recipe", str(recipe)], "--recipe: belongs to --from-dcp"),
    ):
        assert cli.main(["export", str(folder), str(out), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not out.exists()
    words = ["--from-dcp", "--recipe", str(recipe), "--trust-pickle"]
    assert cli.main(["export", str(folder), str(out), *words]) == 0
    loaded, _, _ = load_model(out)
    assert torch.equal(loaded.state_dict()["embedding.weight"], model.state_dict()["embedding.weight"])
