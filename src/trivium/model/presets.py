"""Sizes of the decoder by name, and those that it has without one."""

from typing import Any

# Sizes of published addition models (SPEC, section 4), and GPT-2 small. A preset fills what the recipe leaves out.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"width": 256, "heads": 4, "layers": "attention*4", "ff_width": 512},
    "medium": {"width": 512, "heads": 8, "layers": "attention*6", "ff_width": 1024},
    "large": {"width": 512, "heads": 8, "layers": "attention*8", "ff_width": 2048},
    "gpt2": {
        "width": 768,
        "heads": 12,
        "layers": "attention(bias=true)*12",
        "ff_width": 3072,
        "feedforward": "gelu_new",
    },
    "gpt2_6m": {"width": 256, "heads": 4, "layers": "attention*8", "ff_width": 1024, "feedforward": "gelu_new"},
}
DEFAULTS: dict[str, Any] = {"width": 64, "heads": 4, "layers": "attention*2", "feedforward": "gelu"}
