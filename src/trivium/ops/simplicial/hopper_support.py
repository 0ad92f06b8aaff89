"""What the Hopper backend of 2-simplicial attention can do, told without importing Triton."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from trivium.ops.simplicial import triton_support

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (32, 64, 128)
# For each head width of the backward kernel: rows (query and head) that read one short key, below which the Triton
# backward is faster. On an H200 256 rows gave 203 TFLOPS to 185 at width 128, and 170 to 201 at width 64; there 2048
# gave 335 to 205, and 512 lies between.
BACKWARD_ROWS = {64: 512, 128: 256}
# The rows of one (query, head) fill at most a warpgroup's tile; of narrower windows few share their long keys.
SHORT = range(8, 65)


def missing() -> str | None:
    """Return why the kernel cannot run on this machine, or None."""
    why = triton_support.missing()
    if why is None and triton_support.interpreted():
        why = "Triton's interpreter does not run Gluon"
    if why is None and torch.cuda.get_device_capability() != (9, 0):
        major, minor = torch.cuda.get_device_capability()
        why = f"compute capability {major}.{minor}; it needs 9.0"
    if why is None and find_spec("triton.experimental.gluon") is None:
        why = "this Triton has no Gluon; it needs 3.6"
    return why


def suits(device_type: str) -> str | None:
    """Return why to prefer this backend on a device, or None."""
    return "Hopper kernels" if device_type == "cuda" else None


def refuses(facts: Mapping[str, Any]) -> str | None:
    """Return why the kernel cannot serve a call, or None."""
    if facts.get("form", "trilinear") != "trilinear":
        return f"form {facts['form']}; allowed: trilinear"
    if facts.get("documents"):
        return "documents are not supported"
    if facts.get("dtype", DTYPES[0]) not in DTYPES:
        return f"dtype {facts['dtype']}; allowed: bfloat16, float16"
    if facts.get("width", WIDTHS[0]) not in WIDTHS:
        return f"head width {facts['width']}; allowed: 32, 64, 128"
    short = min(facts.get("window1", SHORT[0]), facts.get("window2", SHORT[0]))
    if short not in SHORT:
        return f"shorter window {short}; allowed: {SHORT[0]} to {SHORT[-1]}"
    return None


def refuses_backward(facts: Mapping[str, Any]) -> str | None:
    """Return why the backward pass is the Triton backend's, or None."""
    if facts.get("deterministic"):
        return "deterministic"
    width = facts.get("width", 128)
    # A width of dynamic shapes can be compared, not hashed.
    needed = next((rows for allowed, rows in BACKWARD_ROWS.items() if allowed == width), None)
    if needed is None:
        return f"head width {width}; allowed: 64, 128"
    rows = facts.get("group", 1) * min(facts.get("window1", 1), facts.get("window2", 1))
    if rows < needed:
        return f"{rows} rows (query heads a key/value head times the shorter window); needs {needed}"
    return None


def remark(facts: Mapping[str, Any]) -> str | None:
    """Return what the record of a choice should say of a call."""
    why = refuses_backward(facts)
    return "backward by Hopper kernels" if why is None else f"backward by Triton: {why}"
