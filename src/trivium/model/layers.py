"""The layer pattern of a model as text: ``attention*6 + simplicial(window1=6, window2=3)*2``."""

import dataclasses
import re
from itertools import groupby
from typing import Any

import yaml

from trivium.config import UserError, from_dict, parse_scalar
from trivium.mixers.base import MIXERS, MixerConfig
from trivium.registry import nearest

MAX_LAYERS = 1000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COUNT = re.compile(r"[0-9]+")
_SPACE = re.compile(r"\s*")


class _Reader:
    """Read a pattern from left to right; every error names the place of its problem."""

    def __init__(self, text: str):
        self.text = text
        self.place = 0

    def fail(self, problem: str, place: int | None = None) -> UserError:
        place = self.place if place is None else place
        return UserError(f"layers: {problem} (at character {place + 1} of {self.text!r})")

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.place)
        self.place = match.end() if match else self.place

    def take(self, symbol: str) -> bool:
        self.skip_space()
        found = self.text.startswith(symbol, self.place)
        self.place += len(symbol) * found
        return found

    def take_pattern(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip_space()
        match = pattern.match(self.text, self.place)
        if match is None:
            raise self.fail(f"expected {what}, got {self._here()}")
        self.place = match.end()
        return match.group()

    def _here(self) -> str:
        return repr(self.text[self.place]) if self.place < len(self.text) else "the end"

    def read(self) -> tuple[MixerConfig, ...]:
        layers: list[MixerConfig] = []
        while True:
            layers += self.read_term()
            if len(layers) > MAX_LAYERS:
                raise self.fail(f"more than {MAX_LAYERS} layers")
            self.skip_space()
            if self.place == len(self.text):
                return tuple(layers)
            if not self.take("+"):
                raise self.fail(f"expected '+', '*' or the end, got {self._here()}")

    def read_term(self) -> list[MixerConfig]:
        self.skip_space()
        start = self.place
        name = self.take_pattern(_NAME, "the name of a mixer")
        if name not in MIXERS.names():
            raise self.fail(f"unknown mixer {name!r}; {nearest(name, MIXERS.names())}", start)
        options = self.read_options(name) if self.take("(") else {}
        try:
            mixer = from_dict(MixerConfig, {"kind": name, **options})
        except UserError as error:
            raise self.fail(f"{name}: {error}", start) from None
        if not self.take("*"):
            return [mixer]
        self.skip_space()
        place = self.place
        count = int(self.take_pattern(_COUNT, "a count"))
        if not 1 <= count <= MAX_LAYERS:
            raise self.fail(f"the count {count} is not allowed; allowed: 1 to {MAX_LAYERS}", place)
        return [mixer] * count

    def read_options(self, name: str) -> dict[str, Any]:
        known = [item.name for item in dataclasses.fields(MIXERS.get(name)) if item.init]
        options: dict[str, Any] = {}
        if self.take(")"):
            return options
        while True:
            self.skip_space()
            place = self.place
            key = self.take_pattern(_NAME, f"an option of {name}")
            if key not in known:
                raise self.fail(f"unknown option {key!r} of {name}; {nearest(key, known)}", place)
            if key in options:
                raise self.fail(f"option {key!r} of {name} is given twice", place)
            if not self.take("="):
                raise self.fail(f"expected '=' after option {key!r}, got {self._here()}")
            options[key] = self.read_value(key)
            if self.take(")"):
                return options
            if not self.take(","):
                raise self.fail(f"expected ',' or ')', got {self._here()}")

    def read_value(self, key: str) -> Any:
        """Read up to the comma or parenthesis that closes the value; quotes and brackets protect theirs."""
        self.skip_space()
        start, depth, quote = self.place, 0, ""
        while self.place < len(self.text):
            symbol = self.text[self.place]
            if quote:
                quote = "" if symbol == quote else quote
            elif symbol in "'\"":
                quote = symbol
            elif symbol in "([{":
                depth += 1
            elif depth == 0 and symbol in ",)":
                break
            elif symbol in ")]}":
                depth -= 1
            self.place += 1
        value = self.text[start : self.place].strip()
        if not value:
            raise self.fail(f"option {key!r} has no value", start)
        if self.place == len(self.text):
            raise self.fail("the parenthesis is never closed")
        return parse_scalar(value)


def parse_layers(text: str) -> tuple[MixerConfig, ...]:
    """Return the mixer of each layer that the pattern `text` names, first layer first.

    The pattern is ``name(option=value, ...)*count + ...``; options and count may be left out, each option is a
    field of that mixer's config and its value is read as YAML. Raises UserError that says where the problem is.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError("layers: the pattern is empty; write for example 'attention*2'")
    return _Reader(text).read()


def format_layers(layers: tuple[MixerConfig, ...]) -> str:
    """Return the shortest pattern that `parse_layers` reads as `layers`; options at their default are left out."""
    terms = []
    for mixer, group in groupby(layers):
        count = len(list(group))
        terms.append(_format_mixer(mixer) + (f"*{count}" if count > 1 else ""))
    return " + ".join(terms)


def _format_mixer(mixer: MixerConfig) -> str:
    options = []
    for item in dataclasses.fields(mixer):
        value = getattr(mixer, item.name)
        if item.init and value != item.default:
            options.append(f"{item.name}={_format_value(value)}")
    return mixer.kind + (f"({', '.join(options)})" if options else "")


def _format_value(value: Any) -> str:
    if isinstance(value, str) and (not _NAME.fullmatch(value) or parse_scalar(value) != value):
        return "'" + value.replace("'", "''") + "'"
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
