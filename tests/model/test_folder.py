import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trivium
from tests.tasks.vocabularies import write_pair
from trivium.config import UserError
from trivium.model.decoder import DecoderConfig
from trivium.model.folder import load, load_model, save_model
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.jsonl import JsonlConfig

TASK = AdditionConfig(format="column", max_digits=2)


def build(**options):
    torch.manual_seed(0)
    return trivium.build(DecoderConfig(width=16, heads=2, positions="block", **options), TASK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", build(), TASK)
    return tmp_path / "model"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_folder_holds_what_other_programs_look_for(folder: Path):
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    model, tokenizer, task = load_model(folder)
    assert config["model_type"] == "trivium"
    assert config["vocab_size"] == len(tokenizer) == len(task.alphabet)
    assert config["max_position_embeddings"] == task.max_length
    assert config["eos_token_id"] == task.alphabet.end_id
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (16, 2, 2)
    assert not model.training


def test_a_tied_tensor_is_written_once(folder: Path):
    names = set(load_file(folder / "model.safetensors"))
    assert "embedding.weight" in names
    assert "head.weight" not in names
    model = build()
    model.register_parameter("alias", model.embedding.weight)
    save_model(folder.with_name("aliased"), model, TASK)
    assert set(load_file(folder.with_name("aliased") / "model.safetensors")) == (names - {"embedding.weight"}) | {
        "alias"
    }


def test_a_run_folder_is_loaded_by_its_model(folder: Path):
    (folder.parent / "config.yaml").write_text("task: {}\n")
    model, tokenizer, task = trivium.load(folder.parent)
    assert torch.equal(model.state_dict()["embedding.weight"], build().embedding.weight)
    assert tokenizer.alphabet == task.alphabet
    assert task.config == TASK


def test_loading_leaves_the_random_state_alone(folder: Path):
    state = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_model_can_be_saved_and_trained(folder: Path):
    model, _, task = load_model(folder)
    save_model(folder.with_name("again"), model, task.config)
    assert (folder.with_name("again") / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    model(torch.tensor([[1, 2, 3]]))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_a_task_read_from_files_is_not_needed_again(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    task_config = JsonlConfig.examples(data)[0]
    save_model(tmp_path / "model", trivium.build(DecoderConfig(width=16, heads=2), task_config), task_config)
    for path in data.iterdir():
        path.unlink()
    _, tokenizer, task = load_model(tmp_path / "model")
    assert tokenizer.encode("1 is ") == task.alphabet.encode("1 is ")


def test_saving_again_replaces_the_weights_and_keeps_other_files(folder: Path):
    (folder / "README.md").write_text("mine")
    model = build()
    torch.nn.init.zeros_(model.embedding.weight)
    save_model(folder, model, TASK)
    assert load_model(folder)[0].state_dict()["embedding.weight"].count_nonzero() == 0
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("there", ["notes", "a file", "another model", "another task"])
def test_what_is_something_else_is_not_overwritten(tmp_path: Path, there: str):
    folder = tmp_path / "model"
    if there == "a file":
        folder.write_text("mine")
    elif there == "notes":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    elif there == "another model":
        save_model(folder, build(layers="attention"), TASK)
    else:
        save_model(folder, build(), AdditionConfig(format="column", max_digits=2, seed=5))
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else folder.read_bytes()
    with pytest.raises(UserError, match="is there already and holds something else, so it is not overwritten"):
        save_model(folder, build(), TASK)
    after = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else folder.read_bytes()
    assert after == before


def test_a_save_on_a_full_disk_leaves_the_old_folder_and_no_other(folder: Path):
    before = (folder / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        for target in (folder, folder.with_name("new")):
            with pytest.raises(OSError, match="File too large"):
                save_model(target, build(), TASK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_save_killed_between_its_renames_has_lost_nothing(folder: Path):
    aside = folder.with_name(".model.aside")
    aside.mkdir()
    folder.rename(aside / "old")
    with pytest.raises(UserError, match="holds something else"):
        save_model(folder, build(tied=False), TASK)
    assert load(folder)[0].config.tied
    assert [path.name for path in folder.parent.iterdir() if path != aside] == ["model"]


def test_what_a_killed_save_left_is_cleared_by_the_next(folder: Path):
    leftover = folder.with_name(".model.aside") / "new"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    save_model(folder, build(), TASK)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert not (folder / "half").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        save_model(tmp_path / "file" / "model", build(), TASK)


def test_folders_that_hold_no_model_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run or model folder"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        load(tmp_path / "file")


def test_truncated_weights_are_refused_wherever_they_end(folder: Path):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model.safetensors: damaged or not a safetensors file"):
            load(folder)
    path.write_bytes(struct.pack("<Q", 2**60) + whole[8:])
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        load(folder)


def test_weights_that_may_not_be_read_are_not_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch):
    open_file = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read: Permission denied$"):
        load(folder)


def test_a_pickle_is_never_opened(folder: Path):
    torch.save(build().state_dict(), folder / "model.safetensors")
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        load(folder)


def test_tensors_of_another_model_are_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.update(extra=tensors.pop("embedding.weight")))
    with pytest.raises(UserError, match=r"holds another model .*: missing embedding.weight; unexpected extra"):
        load(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.update({"embedding.weight": torch.zeros(3, 16)}))
    with pytest.raises(UserError, match=r"embedding.weight is 3x16 where the config says \d+x16"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; only 'trivium' can be loaded"),
        ({"model": {"kind": "decodr"}}, "model: unknown model 'decodr'; did you mean 'decoder'"),
        ({"model": {"kind": "decoder", "widht": 3}}, "model.widht: unknown key"),
        ({"model": None}, "model: missing"),
        ({"task": {"kind": "divination"}}, "task: unknown task 'divination'"),
        ({"context": {"vocab_size": 3}}, "context.max_length: missing"),
        ({"task": {"kind": "addition", "base": 16, "format": "column"}}, "do not have the same alphabet"),
    ],
)
def test_a_config_of_another_kind_is_refused(folder: Path, changes, problem):
    edit_config(folder, **changes)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert problem in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_config_that_is_not_json_is_refused(folder: Path):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        load(folder)


def test_a_model_that_reads_byte_pairs_takes_its_tokenizer_along(tmp_path: Path):
    rows = tmp_path / "train.jsonl"
    rows.write_text(json.dumps({"prompt": "one and ", "answer": "two"}) + "\n")
    pairs = write_pair(tmp_path / "pairs")
    config = JsonlConfig(train=rows, tokenizer=str(pairs))
    save_model(tmp_path / "model", trivium.build(DecoderConfig(width=16, heads=2), config), config)
    save_model(tmp_path / "model", trivium.build(DecoderConfig(width=16, heads=2), config), config)
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    assert described["task"]["tokenizer"] == "."
    assert (described["vocab_size"], described["eos_token_id"]) == (320, 319)
    rows.unlink()
    for path in pairs.iterdir():
        path.unlink()
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    model, tokenizer, task = load_model(moved)
    assert tokenizer.alphabet == task.alphabet
    assert tokenizer.decode(tokenizer.encode("one and two<|endoftext|>")) == "one and two<|endoftext|>"
    save_model(tmp_path / "again", model, task.config)
    assert load_model(tmp_path / "again")[1] == tokenizer
    write_pair(moved, size=300)
    (moved / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no such file"):
        load_model(moved)
