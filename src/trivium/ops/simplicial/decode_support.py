"""What the backends of `simplicial_decode` can do, told without importing Triton."""

from collections.abc import Mapping
from typing import Any

from trivium.ops.simplicial import hopper_support, triton_support

# Rows of one warpgroup's tile are whole short windows of neighbouring heads, so these must divide 64.
HOPPER_ROWS = 64
HOPPER_WIDTHS = (64, 128)


def padded_short(slots: int) -> int:
    """Return the rows that one head takes in a tile of the Hopper kernel."""
    return 1 << (slots - 1).bit_length()


def triton_refuses(facts: Mapping[str, Any]) -> str | None:
    """Return why the Triton kernel cannot serve a call, or None."""
    if facts.get("gradients"):
        return "gradients through a continued state"
    return triton_support.refuses(facts)


def hopper_refuses(facts: Mapping[str, Any]) -> str | None:
    """Return why the Hopper kernel cannot serve a call, or None."""
    if facts.get("gradients"):
        return "gradients through a continued state"
    if facts.get("form", "trilinear") != "trilinear":
        return f"form {facts['form']}; allowed: trilinear"
    if facts.get("dtype", hopper_support.DTYPES[0]) not in hopper_support.DTYPES:
        return f"dtype {facts['dtype']}; allowed: bfloat16, float16"
    if facts.get("width", HOPPER_WIDTHS[0]) not in HOPPER_WIDTHS:
        return f"head width {facts['width']}; allowed: 64, 128"
    if facts.get("tokens", 1) != 1:
        return f"{facts['tokens']} new tokens; allowed: 1"
    if facts.get("older", False):
        return "rings longer than their windows"
    short = min(facts.get("slots1", 32), facts.get("slots2", 32))
    if not 8 <= short <= HOPPER_ROWS:
        return f"shorter ring of {short} slots; allowed: 8 to {HOPPER_ROWS}"
    heads = 2 * HOPPER_ROWS // padded_short(short)
    if facts.get("group", heads) % heads:
        return f"groups of {facts['group']} query heads; with {short} slots allowed: multiples of {heads}"
    return None
