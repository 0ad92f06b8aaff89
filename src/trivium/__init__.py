"""Trivium: a laboratory for language models that reason from few tokens."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivium import ops as ops
    from trivium.model.build import build as build
    from trivium.train.run import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "build", "load", "ops"]

_HOMES = {"build": "trivium.model.build", "load": "trivium.train.run"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import trivium` alone must not wait for torch."""
    if name == "ops":
        return importlib.import_module("trivium.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trivium' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
