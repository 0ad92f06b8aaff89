"""Command-line flags from dataclass fields: name, help and default all come from the field.

A recipe's flags are read as text by tyro and checked by the same strict code as the YAML, so that both accept and
refuse the same values.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from trivium.config import parse_scalar, to_dict
from trivium.registry import UserError, nearest

T = TypeVar("T")

# tyro draws its errors in a box: of box characters on a terminal that has them, of dashes elsewhere.
_BORDER = re.compile(r"\u2500{2}|-{4}")
_EDGE = re.compile(r"[\u2500-\u257f]")
_SAID = re.compile(r"(\(default: [^()]*\)\.)\s+\(default:\s*(?:None|null|'')?\s*\)")
_SHOWS_HELP = ("-h", "--help")


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of the dataclass `cls`, inherited ones included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One field of a recipe that holds a value: its type, its value in the recipe, and its docstring."""

    hint: Any
    value: Any
    doc: str

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is tuple

    def read(self, given: str | Sequence[str]) -> Any:
        """Return the plain value that the text of a flag stands for, as a YAML file would hold it."""
        if not isinstance(given, str):
            one = parse_scalar(given[0]) if len(given) == 1 else None
            return one if isinstance(one, list) else [parse_scalar(text) for text in given]
        options = _options(self.hint)
        value = parse_scalar(given)
        if str in options and not (value is None and type(None) in options):
            return given
        return value


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(argument) for argument in typing.get_args(hint)})
    return (hint,)


def leaves(config: Any) -> dict[str, dict[str, Leaf]]:
    """Return every value of the dataclass instance `config`: section -> key -> leaf; its own values' section is ""."""
    found: dict[str, dict[str, Leaf]] = {"": {}}
    hints = typing.get_type_hints(type(config))
    docs = field_docs(type(config))
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = leaves(value)
            found |= {f"{name}.{section}".rstrip("."): part for section, part in inner.items() if part}
        elif isinstance(value, Mapping) and _is_mapping(typing.get_args(hints[name])[1]):
            # The variants of a study: each changes some dotted keys.
            for entry, changes in value.items():
                doc = f"What the variant {entry!r} has here."
                found[f"{name}.{entry}"] = {key: Leaf(Any, item, doc) for key, item in changes.items()}
        elif field.init and not _holds_config(hints[name]):
            found[""][name] = Leaf(hints[name], value, docs.get(name, ""))
    return found


def _holds_config(hint: Any) -> bool:
    return any(dataclasses.is_dataclass(option) for option in _options(hint))


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) in (dict, Mapping)


def _metavar(hint: Any) -> str:
    names = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false", Path: "PATH", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return "VALUE"
    if origin in (typing.Union, types.UnionType):
        return "|".join(_metavar(option) for option in arguments)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"[{_metavar(arguments[0])} ...]"
    if _is_mapping(hint):
        return "{KEY: VALUE ...}"
    return names.get(hint, "VALUE")


def _as_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return json.dumps(to_dict(value))  # YAML reads it back
    return str(value).lower() if isinstance(value, bool) else str(value)


def _section_class(section: str, part: Mapping[str, Leaf]) -> type:
    """Return a dataclass with one text field for each leaf; the fields' own names don't matter."""
    rows = []
    for number, (key, leaf) in enumerate(part.items()):
        kind: Any = tuple[str, ...] if leaf.is_list else str
        default: Any = tuple(map(_as_text, leaf.value)) if leaf.is_list else _as_text(leaf.value)
        annotation = tyro.conf.arg(name=key, help=leaf.doc or " ", metavar=_metavar(leaf.hint))
        rows.append((f"field{number}", Annotated[kind, annotation], dataclasses.field(default=default)))
    made = dataclasses.make_dataclass("section", rows, frozen=True)
    made.__doc__ = " "
    return made


def parse(options: type[T], arguments: Sequence[str], prog: str, description: str) -> T:
    """Read `arguments` into the dataclass `options`; raise UserError of one line, or SystemExit(0) after --help."""
    return _parse(options, arguments, prog, description)


def parse_with_recipe(
    options: type[T], config: Any, arguments: Sequence[str], prog: str, description: str
) -> tuple[T, dict[str, Any]]:
    """Read `arguments` into `options` and the overrides of a recipe: dotted key -> plain value.

    `config` is the recipe as its file has it: the flags and the defaults that --help shows are its fields and values.
    """
    parts = {section: part for section, part in leaves(config).items() if part}
    rows: list[Any] = []
    for number, (section, part) in enumerate(parts.items()):
        made = _section_class(section, part)
        annotated = Annotated[made, tyro.conf.arg(name=section)]
        rows.append((f"section{number}", annotated, dataclasses.field(default_factory=made)))
    combined = dataclasses.make_dataclass(options.__name__, rows, bases=(options,), frozen=True)
    parsed: Any = _parse(combined, arguments, prog, description)
    overrides: dict[str, Any] = {}
    for number, (section, part) in enumerate(parts.items()):
        values = getattr(parsed, f"section{number}")
        for field, (key, leaf) in zip(dataclasses.fields(values), part.items(), strict=True):
            given = getattr(values, field.name)
            if given != field.default:
                overrides[f"{section}.{key}".lstrip(".")] = leaf.read(given)
    own = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(options)}  # pyright: ignore[reportArgumentType]
    return options(**own), overrides


def take_kinds(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--task.kind NAME` and `--model.kind NAME` out of `arguments`: they choose which other flags there are."""
    kinds: dict[str, str] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--task.kind", "--model.kind"):
            rest.append(word)
            continue
        kind = value if equals else next(words, None)
        if kind is None:
            raise UserError(f"{name}: give its value behind it")
        kinds[name[2:]] = kind
    return rest, kinds


def _parse(cls: type[T], arguments: Sequence[str], prog: str, description: str) -> T:
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                # A positional argument that is given would be left out of the help.
                cls,
                prog=prog,
                description=description,
                args=["--help"] if wants_help(arguments) else list(arguments),
                return_unknown_args=True,
                config=(tyro.conf.DisallowNone,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            # A field that is None until it is looked up tells its default itself.
            print(_SAID.sub(r"\1", printed.getvalue()), end="")
            raise SystemExit(0) from None
        raise UserError(_first_words(errors.getvalue() + printed.getvalue())) from None
    if unknown:
        flags = re.findall(r"--[a-zA-Z][\w.-]*", _quiet_help(cls, prog))
        raise UserError(_unknown(unknown, [flag for flag in dict.fromkeys(flags) if flag != "--help"]))
    return parsed


def _quiet_help(cls: type, prog: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(cls, prog=prog, args=["--help"])
    return printed.getvalue()


def _unknown(unknown: Sequence[str], known: list[str]) -> str:
    flag = next((word for word in unknown if word.startswith("-")), None)
    if flag is None:
        return f"{unknown[0]!r}: there is no place for this argument"
    name = flag.partition("=")[0].replace("_", "-")
    tails: dict[str, list[str]] = {}
    for option in known:
        tails.setdefault(option.rpartition(".")[2].lstrip("-"), []).append(option)
    same = tails.get(name.rpartition(".")[2].lstrip("-"), [])
    answer = f"did you mean {same[0]!r}?" if len(same) == 1 else nearest(name, known).partition(" allowed: ")[0]
    answer = "" if answer.startswith("allowed:") else f"; {answer}"
    return f"unknown flag {flag!r}{answer} (--help lists them all)"


_KINDS = {"INT": "a whole number", "FLOAT": "a number"}


def _first_words(text: str) -> str:
    """Return what tyro says inside its box, on one line and without the border that holds the box's title."""
    lines = [_EDGE.sub("", line).strip() for line in text.splitlines() if not _BORDER.search(line)]
    words = " ".join(line for line in lines if line).partition(" For full helptext")[0]
    if found := re.search(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*?),?\)", words):
        given, flag, allowed = found.groups()
        return f"{flag}: {given!r} is not allowed; allowed: {allowed.replace(chr(39), '')}"
    if found := re.search(r"Error parsing (--[\w.-]+): .*'(.*)'.* Argument helptext: .*?--[\w.-]+ (\S+)", words):
        flag, given, kind = found.groups()
        return f"{flag}: expected {_KINDS.get(kind.strip('[]{}'), kind)}, got {given!r}"
    if found := re.search(r"Missing value for argument '(.*?)'", words):
        return f"{found[1]}: give its value behind it"
    if found := re.search(r"Missing from [^:]*: (\S+) (.*)", words):
        return f"{found[1]} is missing: {found[2].replace(' (required)', '')}"
    return words


def find_recipe(arguments: Sequence[str], switches: Sequence[str] = ("--json",)) -> Path | None:
    """Return the first argument that is not a flag or a flag's value: the recipe; None when there is none."""
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            return Path(word)
        if "=" not in word and word not in (*switches, *_SHOWS_HELP):
            next(words, None)
    return None


def wants_help(arguments: Sequence[str]) -> bool:
    """Say whether the arguments ask for help."""
    return any(word in _SHOWS_HELP for word in arguments)
