"""What the contract tests run of each model, as fields of its config."""

from typing import Any

from trivium.mixers.base import MIXERS
from trivium.model.layers import format_layers

_OPTIONS: list[dict[str, Any]] = [
    *({"positions": positions} for positions in ("learned", "sinusoidal", "rotary", "none")),
    {"tied": False, "norm": "rmsnorm", "feedforward": "swiglu", "ff_width": 21},
    {"checkpoint_activations": True, "feedforward": "gelu_new", "positions": "block", "block_offset": 3},
    {"positions": "block", "loops": 3, "input_injection": True},
    {"experts": 3, "experts_per_token": 2, "identity": (1,), "feedforward": "gelu_new"},
    {"experts": 4, "experts_per_token": 1, "experts_in": (1,), "feedforward": "swiglu"},
    {
        "positions": "block",
        "run_table": "sinusoidal",
        "position_base": 30.0,
        "block_offset": 2,
        "read_offset": 1,
    },
    {"positions": "block", "closing": True},
    {"positions": "block", "run_table": "rotary", "position_base": 30.0},
]


_CHUNKS: list[dict[str, Any]] = [
    {"chunk": 1, "aggregator_layers": 2, "layers": "attention*2"},
    {"chunk": 2, "positions": "absolute", "tied": False, "norm": "rmsnorm", "feedforward": "swiglu"},
    {"chunk": 8, "ff_width": 21, "normed": True},
]


def decoders() -> list[dict[str, Any]]:
    """Return one decoder for each mixer, a hybrid of them all, and one for each option of the model."""
    first = {name: MIXERS.get(name).examples()[0] for name in MIXERS.names()}
    patterns = [format_layers((mixer, mixer)) for mixer in first.values()]
    patterns.append(format_layers(tuple(first.values())))
    return [*({"layers": pattern, "positions": "block"} for pattern in patterns), *_OPTIONS]


def prefix_scans() -> list[dict[str, Any]]:
    """Return one model for each mixer of the predictor, and chunks that do and do not divide a length."""
    mixers = [MIXERS.get(name).examples()[0] for name in MIXERS.names()]
    return [*({"chunk": 3, "layers": format_layers((mixer,))} for mixer in mixers), *_CHUNKS]
