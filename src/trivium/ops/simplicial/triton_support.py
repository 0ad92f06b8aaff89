"""What the Triton backend of 2-simplicial attention can do, told without importing Triton."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256


def interpreted() -> bool:
    """Return whether Triton's interpreter is asked for, which runs kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Return why Triton kernels cannot run on this machine, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU, and TRITON_INTERPRET=1 is not set"
    return None


def suits(device_type: str) -> str | None:
    """Return why to prefer Triton on a device, or None: the interpreter is for those who ask for it."""
    return "Triton kernels on a GPU" if device_type == "cuda" else None


def refuses(facts: Mapping[str, Any]) -> str | None:
    """Return why these kernels cannot serve a call, or None."""
    if facts.get("form") == "factorized":
        return "the factorized form has no Triton kernel"
    if facts.get("dtype", DTYPES[0]) not in DTYPES:
        return f"dtype {facts['dtype']}; allowed: bfloat16, float16, float32"
    if facts.get("width", 1) > MAX_WIDTH:
        return f"head width {facts['width']}; allowed: at most {MAX_WIDTH}"
    return None


def remark(facts: Mapping[str, Any]) -> str | None:
    """Return what the record of a choice should say of a call."""
    return "deterministic backward" if facts.get("deterministic") else None
