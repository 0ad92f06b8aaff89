"""Where the kernels in C serve: what an operator registers them with, without compiling them yet."""

from collections.abc import Mapping
from typing import Any

_TYPES = ("float32", "bfloat16", "float64")


def missing() -> str | None:
    """Return why the kernels cannot be had on this machine, or None; the first call compiles them (seconds)."""
    from trivium.ops.native.kernels import missing

    return missing()


def suits(device_type: str) -> str | None:
    """Return why "auto" should take them, or None away from a CPU."""
    return "compiled from C for this processor" if device_type == "cpu" else None


def refuses(facts: Mapping[str, Any]) -> str | None:
    """Return why they cannot compute in the call's dtype, or None."""
    dtype = str(facts.get("dtype", _TYPES[0])).removeprefix("torch.")
    return None if dtype in _TYPES else f"it computes in {', '.join(_TYPES)}, not {dtype}"
