"""Which models `trivium bench latency` times, from text: layer patterns, prefix-scan models, run folders."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trivium.config import from_dict, parse_scalar
from trivium.model.base import LanguageModel, ModelConfig, ModelContext
from trivium.model.folder import load
from trivium.model.layers import format_layers, parse_layers
from trivium.model.prefix_scan import PrefixScanConfig
from trivium.registry import UserError, nearest

VOCABULARY = 256
_SCAN = re.compile(r"prefix_scan(?:\((.*)\))?", re.DOTALL)
_OPTION = re.compile(r"\s*(\w+)\s*=((?:[^,()]|\([^()]*\))*)(?:,|$)")


@dataclass(frozen=True)
class TimedModel:
    """A model to time: its name in tables, the mixer that gives it its colour, and where its weights come from."""

    name: str
    mixer: str
    config: ModelConfig
    context: ModelContext
    folder: Path | None = None

    @property
    def layers(self) -> int:
        """Blocks, those of a prefix scan's aggregator and predictor together."""
        own = len(getattr(self.config, "mixers", ()))
        return own + (self.config.aggregator_layers if isinstance(self.config, PrefixScanConfig) else 0)

    @property
    def chunk(self) -> int:
        """Tokens between boundaries; 1 where there are none."""
        return self.config.chunk if isinstance(self.config, PrefixScanConfig) else 1

    def build(self) -> LanguageModel:
        """Return the model: a run's, or one with random weights."""
        if self.folder is not None:
            return load(self.folder)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.config.build(self.context).eval()


def timed_models(
    texts: Sequence[str],
    *,
    width: int,
    heads: int,
    layers: int,
    room: int,
    positions: str = "none",
    backends: Mapping[str, str] | None = None,
) -> list[TimedModel]:
    """Return the model that each text names: ``gla`` or any layer pattern (one layer is repeated `layers` times),
    ``prefix_scan(chunk=64)`` with options of its config (half of the layers aggregate, the others predict), or the
    folder of a run, which keeps its own backends. Raises UserError for a text that is none of these, and unless all
    have equal layers and width.
    """
    context = ModelContext(VOCABULARY, room, backends=dict(backends or {}))
    models = [_read(text, width, heads, layers, context, positions) for text in texts]
    first = models[0]
    for model in models:
        for what, mine, theirs in (
            ("layers", model.layers, first.layers),
            ("width", getattr(model.config, "width", 0), getattr(first.config, "width", 0)),
        ):
            if mine != theirs:
                raise UserError(
                    f"--models: {model.name} has {what} {mine}, {first.name} has {theirs}; "
                    "latency is compared at equal layers and width"
                )
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--models: {twice} is given twice")
    return models


def _read(text: str, width: int, heads: int, layers: int, context: ModelContext, positions: str) -> TimedModel:
    if Path(text).is_dir():
        model = load(text)[0]
        mixers: Any = getattr(model.config, "mixers", ())
        kind = "prefix_scan" if isinstance(model.config, PrefixScanConfig) else mixers[-1].kind
        return TimedModel(Path(text).name, kind, model.config, model.context, Path(text))
    scan = _SCAN.fullmatch(text.strip())
    if scan is not None:
        if layers < 2:
            raise UserError(f"--layers: {layers} is not allowed with prefix_scan; it needs at least 2")
        options = _options(scan.group(1) or "")
        given: dict[str, Any] = {"width": width, "heads": heads, "aggregator_layers": layers // 2} | options
        if "layers" not in given:
            given["layers"] = f"attention*{max(1, layers - int(given['aggregator_layers']))}"
        config = from_dict(ModelConfig, {"kind": "prefix_scan", **given}, f"--models: {text}")
        return TimedModel(text.strip(), "prefix_scan", config, context)
    try:
        mixers = parse_layers(text)
    except UserError as error:
        raise UserError(f"--models: {error}; or prefix_scan(chunk=N), or a run folder") from None
    mixers = mixers * layers if len(mixers) == 1 else mixers
    pattern = format_layers(mixers)
    given = {"width": width, "heads": heads, "layers": pattern, "positions": positions}
    config = from_dict(ModelConfig, {"kind": "decoder", **given}, f"--models: {text}")
    local = mixers[-1].kind == "attention" and getattr(mixers[-1], "window", None) is not None
    kinds = {mixer.kind for mixer in mixers}
    name = format_layers(mixers[:1]) if len(set(mixers)) == 1 else pattern
    return TimedModel(name, "local" if local and len(kinds) == 1 else mixers[-1].kind, config, context)


def _options(text: str) -> dict[str, Any]:
    known = [item.name for item in dataclasses.fields(PrefixScanConfig) if item.init]
    options: dict[str, Any] = {}
    place = 0
    while place < len(text):
        match = _OPTION.match(text, place)
        if match is None:
            raise UserError(f"--models: prefix_scan({text}): expected option=value, got {text[place:]!r}")
        if match.group(1) not in known:
            raise UserError(
                f"--models: unknown option {match.group(1)!r} of prefix_scan; {nearest(match.group(1), known)}"
            )
        options[match.group(1)] = parse_scalar(match.group(2).strip())
        place = match.end()
    return options
