"""A model as a folder that Hugging Face tools can read: safetensors, config.json and the tokenizer's files.

Nothing here is ever unpickled. A folder is written aside and renamed, so that a killed process leaves no half of one.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import trivium
from trivium.config import UserError, from_dict, to_dict, unreadable
from trivium.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_of
from trivium.model.base import Decoding, LanguageModel, ModelConfig, ModelContext
from trivium.model.card import MARK, model_card
from trivium.report.storage import make_folders, naming, write_whole
from trivium.tasks.base import Task, TaskConfig
from trivium.tasks.byte_pairs import TOKENIZER_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of weights that transformers wrote in several files
CARD_FILE = "README.md"
WRAPPED = "model."  # what the names of tensors begin with in a file that transformers wrote
MODEL_TYPE = "trivium"
HERE = "."  # a task's tokenizer, as a model folder names it: its files are in the folder


def save_model(
    folder: str | Path, model: LanguageModel, task_config: TaskConfig, trained: Mapping[str, Any] | None = None
) -> None:
    """Write `model` and its task to `folder`; an older save of the same configuration is replaced.

    `trained` is the `training_record` of its run, for the model card. Raises UserError when `folder` holds something
    else, and OSError when it cannot be written.
    """
    folder = Path(folder)
    _restore(folder)
    task = task_config.build()
    described = _describe(model, task, trained)
    _check_replaceable(folder, described)
    with naming(folder), _written_aside(folder) as aside:
        _write_json(aside / CONFIG_FILE, described)
        tokenizer_of(task.alphabet).save(aside)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(model).items()}
        # Not save_file, which tells of a full disk in words of its own instead of an OSError.
        (aside / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        if keeps_card(folder):
            (aside / CARD_FILE).write_text(model_card(described), encoding="utf-8")


def record_training(folder: str | Path, trained: Mapping[str, Any]) -> None:
    """Put the `training_record` of its run into a saved model's config.json and card; OSError if that cannot be."""
    folder = Path(folder)
    described = _read_config(folder) | {"trained": dict(trained)}
    write_whole(folder / CONFIG_FILE, _json_text(described))
    if keeps_card(folder):
        write_whole(folder / CARD_FILE, model_card(described))


def keeps_card(folder: Path) -> bool:
    """Say whether the card in `folder` is this program's to write: there is none, or it wrote it."""
    path = folder / CARD_FILE
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def load(folder: str | Path) -> tuple[LanguageModel, Tokenizer, Task]:
    """Return (model, tokenizer, task) from a model folder or a finished run's folder; the model is in eval mode.

    Raises UserError when it is neither, or when a file in it is missing, damaged or of another model.
    """
    folder = Path(folder)
    inner = folder / "model"
    if not (folder / CONFIG_FILE).is_file() and (inner / CONFIG_FILE).is_file():
        return load_model(inner)
    return load_model(folder)


def load_model(folder: str | Path) -> tuple[LanguageModel, Tokenizer, Task]:
    """Return (model, tokenizer, task) from a model folder; the errors are those of `load`."""
    folder = Path(folder)
    described = _read_config(folder)
    where = str(folder / CONFIG_FILE)
    task = described_task(described, folder)
    tensors = _read_weights(folder)
    with torch.random.fork_rng(devices=[]):
        model = described_model(described, where)
    _check_tensors(folder / WEIGHTS_FILE, model.state_dict(), tensors)
    # assign keeps the file's precision, which may differ from the default that the model was built in.
    model.load_state_dict(tensors, assign=True)
    if "transformers_version" in described and not (folder / TOKENIZER_FILE).exists():
        tokenizer = tokenizer_of(task.alphabet)  # transformers saves a tokenizer apart, and the task's is this one
    else:
        tokenizer = load_tokenizer(folder)
    if tokenizer.alphabet != task.alphabet or len(tokenizer) != model.context.vocab_size:
        raise UserError(
            f"{where}: model ({model.context.vocab_size} symbols), tokenizer ({len(tokenizer)}) and task "
            f"({len(task.alphabet)}) do not have the same alphabet"
        )
    return model.eval(), tokenizer, task


def described_model(described: Mapping[str, Any], where: str = CONFIG_FILE) -> LanguageModel:
    """Return a new model as config.json, as plain data, describes it; UserError names `where` it cannot be built."""
    config = from_dict(ModelConfig, described["model"], f"{where}: model")
    context = from_dict(ModelContext, described["context"], f"{where}: context")
    model = config.build(context)
    model.decoding = from_dict(Decoding, described.get("decoding") or {}, f"{where}: decoding")
    return model


def described_task(described: Mapping[str, Any], folder: str | Path) -> Task:
    """Return the task that config.json, as plain data, describes, its tokenizer's files being in `folder`."""
    plain = _with_tokenizer(described["task"], HERE, str(folder))
    return from_dict(TaskConfig, plain, f"{Path(folder) / CONFIG_FILE}: task").build()


def _describe(model: LanguageModel, task: Task, trained: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return config.json: the usual names for other programs, and the exact configs for this one."""
    config = to_dict(model.config)
    usual = {
        "hidden_size": config.get("width"),
        "num_attention_heads": config.get("heads"),
        "num_hidden_layers": len(getattr(model.config, "mixers", ())) or None,
        "tie_word_embeddings": config.get("tied"),
    }
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["TriviumForCausalLM"],
        "vocab_size": model.context.vocab_size,
        "max_position_embeddings": config.get("max_length") or model.context.max_length,
        **{key: value for key, value in usual.items() if value is not None},
        "eos_token_id": task.alphabet.end_id,
        "pad_token_id": task.alphabet.pad_id,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "trivium_version": trivium.__version__,
        "model": config,
        "context": to_dict(model.context),
        "decoding": to_dict(model.decoding),
        # The task's own config has what it read from files filled in, so that loading does not need them.
        "task": _with_tokenizer(to_dict(task.config), None, HERE),
        "task_version": task.version,
        "labels": task.labels,
        **({} if trained is None else {"trained": dict(trained)}),
    }


def _with_tokenizer(task: Any, old: str | None, new: str) -> Any:
    """Return a task's plain config, also one made of other tasks, with every tokenizer `old` (None: any) as `new`."""
    if not isinstance(task, Mapping):
        return task
    return {
        key: new
        if key == "tokenizer" and isinstance(value, str) and old in (None, value)
        else _with_tokenizer(value, old, new)
        for key, value in task.items()
    }


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer that is saved by name, a tensor that several names share under the first."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor
    return named


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: is a file, not a folder")
    if not path.is_file():
        raise UserError(f"{folder}: not a run or model folder (no {CONFIG_FILE}, no model/{CONFIG_FILE} in it)")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise unreadable(path, error) from None
    kind = described.get("model_type") if isinstance(described, Mapping) else None
    if kind != MODEL_TYPE:
        raise UserError(f"{path}: model_type is {kind!r}; only {MODEL_TYPE!r} can be loaded")
    for key in ("model", "context", "task"):
        if not isinstance(described.get(key), Mapping):
            raise UserError(f"{path}: {key}: missing")
    return dict(described)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by the names that the model gives them; transformers writes them as parts of its
    own model, and may spread them over files."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable(index, error) from None
        tensors = {name: tensor for part in parts for name, tensor in _read_tensors(folder / Path(part).name).items()}
    else:
        tensors = _read_tensors(folder / WEIGHTS_FILE)
    if tensors and all(name.startswith(WRAPPED) for name in tensors):
        return {name.removeprefix(WRAPPED): tensor for name, tensor in tensors.items()}
    return tensors


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        path.open("rb").close()  # safetensors calls a file that may not be read a missing one
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file: {error}") from None


def _check_tensors(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    problems = []
    missing, extra = [name for name in wanted if name not in found], [name for name in found if name not in wanted]
    if missing:
        problems.append(f"missing {_list(missing)}")
    if extra:
        problems.append(f"unexpected {_list(extra)}")
    for name in wanted:
        if name in found and found[name].shape != wanted[name].shape:
            problems.append(f"{name} is {_shape(found[name])} where the config says {_shape(wanted[name])}")
            break
    if problems:
        raise UserError(f"{path}: holds another model than {CONFIG_FILE} describes: {'; '.join(problems)}")


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(_json_text(value), encoding="utf-8")


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _check_replaceable(folder: Path, described: Mapping[str, Any]) -> None:
    """Raise UserError unless `folder` is absent, empty, or holds an older save of the same model and task."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        there = _read_config(folder)
    except UserError:
        there = {}
    if any(there.get(key) != described[key] for key in ("model", "context", "task")):
        raise UserError(f"{folder}: is there already and holds something else, so it is not overwritten")


def _places_aside(folder: Path) -> tuple[Path, Path, Path]:
    """Return where a save keeps all of its own, the new folder, and the old one between the last two steps."""
    aside = folder.with_name(f".{folder.name}.aside")  # one name, so that what a killed process left is cleared away
    return aside, aside / "new", aside / "old"


def _restore(folder: Path) -> None:
    """Put the old folder back if a save was killed when that was moved away and the new one was not in its place."""
    _, _, old = _places_aside(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `folder` when the block ends without an error.

    Files of the old folder that the block did not write are kept.
    """
    aside, new, old = _places_aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    make_folders(aside)
    new.mkdir()
    try:
        yield new
        if folder.exists():
            for path in folder.iterdir():
                if not (new / path.name).exists():
                    (shutil.copytree if path.is_dir() else shutil.copy2)(path, new / path.name)
        for path in new.rglob("*"):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until `path` is on the disk, so that a power cut cannot leave a renamed folder of empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
