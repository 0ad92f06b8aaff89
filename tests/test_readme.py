"""What the README and the docs show is true: their code runs, their commands exist, their files are there."""

import dataclasses
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.contracts import mixer_checks
from tests.contracts.task_checks import CHECKS
from trivium import cli
from trivium.commands.flags import field_docs
from trivium.mixers.base import MIXERS, MixerContext
from trivium.model.decoder import DecoderConfig
from trivium.study.recipe import load_recipe
from trivium.tasks.base import TASKS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.fixture
def registered(tmp_path):
    """A function that imports a block of the README that names its file, and forgets what it registered afterwards."""
    before = {registry: dict(registry._classes) for registry in (MIXERS, TASKS) if registry.names()}

    def load(name: str) -> ModuleType:
        (text,) = [block for block in blocks(ROOT / "README.md", "python") if block.startswith(f"# src/trivium/{name}")]
        path = tmp_path / Path(name).name
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    for registry, classes in before.items():
        registry._classes.clear()
        registry._classes.update(classes)
    for name in [name for name in sys.modules if name.startswith("readme_")]:
        del sys.modules[name]


def test_the_mixer_of_the_readme_keeps_the_contract(registered):
    cls = registered("mixers/gated.py").GatedConfig
    context = MixerContext(width=24, heads=4, max_length=16)
    for config in cls.examples():
        mixer = mixer_checks.build(config, context)
        mixer_checks.check_streaming(mixer)
        mixer_checks.check_ragged(mixer)
        mixer_checks.check_causal(mixer)
        mixer_checks.check_documents(mixer)
        mixer_checks.check_functional(mixer)
        mixer_checks.check_select_and_reset(mixer)
        mixer_checks.check_counts(config, context)
    layers = "attention*1 + gated(window=6)*1"
    assert [mixer.kind for mixer in DecoderConfig(layers=layers).mixers] == ["attention", "gated"]


def test_the_task_of_the_readme_keeps_the_contract_and_trains(registered, tmp_path, capsys):
    cls = registered("tasks/reverse.py").ReverseConfig
    assert set(field_docs(cls)) == {field.name for field in dataclasses.fields(cls)}
    task = cls().build()
    for check in CHECKS:
        check(task)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("task: {kind: reverse}\nmodel: {width: 16}\ntrain: {steps: 2, batch: 8, eval_examples: 8}\n")
    assert cli.main(["train", str(recipe), "--evaluate.examples", "4", "--runs", str(tmp_path / "runs")]) == 0


def test_the_operator_example_of_the_readme_runs():
    (text,) = [block for block in blocks(ROOT / "README.md", "python") if "simplicial_attention" in block]
    names: dict[str, torch.Tensor] = {}
    exec(text, names)
    assert names["o"].shape == names["q"].shape
    assert names["q"].grad is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_exists_and_so_do_its_recipes(page):
    text = page.read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`(trivium [^`]+)`", text)
    for line in lines:
        words = shlex.split(line)
        if words[:1] == ["trivium"]:
            name, rest = cli.resolve(words[1:])
            assert name in cli.COMMANDS
            for word in rest:
                if word.startswith("recipes/"):
                    assert (ROOT / word).is_file(), line
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[-1]}:", (ROOT / "Makefile").read_text(), flags=re.M), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_that_a_page_shows_is_accepted(page, tmp_path):
    for number, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"r{number}.yaml"
        path.write_text(text)
        assert load_recipe(path).compare is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_contributing_is_short_enough_to_be_read():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60


def test_every_installed_package_is_pinned_within_its_bounds():
    from importlib.metadata import metadata, requires

    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert metadata("trivium")["Requires-Python"] == ">=3.11"
    for text in requires("trivium") or []:
        need = Requirement(text)
        if need.name in ("torch", "triton", "trivium"):
            continue
        assert need.specifier.contains(pinned[need.name.lower()]), text
