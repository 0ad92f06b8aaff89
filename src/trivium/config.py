"""Strict configuration: YAML to frozen dataclasses and back, with errors that say what, where and what is allowed.

A knob is a dataclass field followed by a one-line docstring. The YAML key, the command-line flag and the
help text all come from that field. Fields made with ``knob(..., affects_results=False)`` stay out of the hash
that names a run.
"""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from trivium.registry import UserError, nearest

T = TypeVar("T")

__all__ = [
    "UserError",
    "config_hash",
    "from_dict",
    "knob",
    "load_yaml",
    "parse_scalar",
    "results_only",
    "set_path",
    "to_dict",
    "to_yaml",
    "unreadable",
]


def knob(
    default: Any = dataclasses.MISSING,
    *,
    factory: Any = dataclasses.MISSING,
    affects_results: bool | Literal["unless_default"] = True,
    hashed_as: Callable[[Any], Any] | None = None,
) -> Any:
    """Declare a dataclass field; `affects_results=False` keeps it out of the run hash, "unless_default" its default.

    A field that is added later is of the last kind: runs and studies from before it keep their names. `hashed_as` gives
    what the hash takes for a value, where several spell the same.
    """
    metadata = {"affects_results": affects_results, "hashed_as": hashed_as}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML libraries otherwise accept in silence."""


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str | int | float | bool) and key is not None:
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from `path`; raise UserError naming file and line when it is missing or malformed."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this file holds {_describe(data)}")
    return data


def unreadable(path: str | Path, error: Exception) -> UserError:
    """Return the UserError for a file that is there and cannot be read, because of `error`."""
    return UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"{value!r}"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build the dataclass `cls` from plain data, checking every key and type.

    A class that carries a ``registry`` (mixers, tasks, models) is chosen by the key ``kind``. Raises UserError
    that names the path of the offending key (`where` is its prefix) and what is allowed there.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where or cls.__name__}: expected a mapping of keys, got {_describe(data)}")
    data = dict(data)
    registry = cls.__dict__.get("registry")
    if registry is not None:
        kind = data.pop("kind", cls.__dict__.get("default_kind"))
        if not isinstance(kind, str):
            raise UserError(f"{where or cls.__name__}: give its kind: one of {', '.join(registry.names())}")
        try:
            cls = registry.get(kind)
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from None
    elif "kind" in data and getattr(cls, "kind", None) == data["kind"]:
        del data["kind"]
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise UserError(f"{path}: unknown key; {nearest(str(key), list(fields))}")
        values[key] = _convert(_hints(cls)[key], value, path)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}.{name}: missing" if where else f"{name}: missing")
    try:
        return cls(**values)
    except UserError as error:
        message = str(error)
        if not where or message.startswith(where):
            raise UserError(message) from None
        # A check of one field begins with its name, a check of several begins with words.
        joint = "." if re.split(r"[:.\[]", message, maxsplit=1)[0] in fields else ": "
        raise UserError(f"{where}{joint}{message}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        problems = []
        for option in options:
            try:
                return _convert(option, value, where)
            except UserError as error:
                problems.append(str(error))
        if len(problems) == 1:
            # Of a section that may be null, only the section itself may, not what is wrong inside it.
            own = type(None) in arguments and problems[0].startswith(f"{where}: ")
            raise UserError(problems[0] + (" or null" if own else ""))
        raise UserError(f"{where}: expected {_name(hint)}, got {_describe(value)}")
    if origin is Literal:
        if value in arguments and not (isinstance(value, bool) and True not in arguments and False not in arguments):
            return value
        known = [str(argument) for argument in arguments]
        raise UserError(f"{where}: {value!r} is not allowed; {nearest(str(value), known)}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {_describe(value)}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise UserError(f"{where}: expected a list of {len(arguments)}, got {_describe(value)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(_convert(argument, item, f"{where}[{i}]") for i, (argument, item) in enumerate(pairs))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping of keys, got {_describe(value)}")
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) or "registry" in getattr(hint, "__dict__", {}):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # pyright: ignore[reportArgumentType]
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0:
        return int(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML 1.1 reads 3e-3 as text, because it wants a dot in the mantissa.
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    raise UserError(f"{where}: expected {_name(hint)}, got {_describe(value)}")


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(option) for option in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint))


def to_dict(config: Any) -> Any:
    """Return plain data (dicts, lists, scalars) from which `from_dict` rebuilds an equal config."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = getattr(config, "kind", None)
        head = {"kind": kind} if isinstance(kind, str) else {}
        return head | {
            field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init
        }
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    return config


def to_yaml(config: Any) -> str:
    """Return `config` (a dataclass or plain data) as YAML text, keys in the order of the fields."""
    # Left unescaped, a line separator inside text would come back as a space.
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=False, width=100)


def config_hash(config: Any) -> str:
    """Return 8 hex digits naming the fields of `config` that change results."""
    text = json.dumps(results_only(config), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def results_only(config: Any) -> Any:
    """Return `config` as plain data without the fields that do not change results."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kept = [field for field in dataclasses.fields(config) if field.init and _counts(field, config)]
        kind = getattr(config, "kind", None)
        return ({"kind": kind} if isinstance(kind, str) else {}) | {
            field.name: results_only(_hashed(field, getattr(config, field.name))) for field in kept
        }
    if isinstance(config, Mapping):
        return {str(key): results_only(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [results_only(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def _hashed(field: dataclasses.Field[Any], value: Any) -> Any:
    as_which = field.metadata.get("hashed_as")
    return value if as_which is None else as_which(value)


def _counts(field: dataclasses.Field[Any], config: Any) -> bool:
    affects = field.metadata.get("affects_results", True)
    return bool(affects) and (affects != "unless_default" or getattr(config, field.name) != field.default)


def parse_scalar(text: str) -> Any:
    """Read one YAML value from `text`, so that a command line and a recipe agree on what `1e-3` or `null` means."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        return text


def set_path(data: dict[str, Any], path: str, value: Any) -> None:
    """Set `data["a"]["b"] = value` for the dotted path "a.b" in place, making sections on the way."""
    *sections, last = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"{path}: {section!r} is a value, not a section")
    data[last] = value
