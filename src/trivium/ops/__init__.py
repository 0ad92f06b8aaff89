"""Operators: pure functions of tensors, each with a plain reference and faster backends that agree with it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivium.ops.delta_rule import gated_delta_rule
    from trivium.ops.documents import document_ids
    from trivium.ops.linear_attention import gated_linear_attention
    from trivium.ops.scan import OnlineScan, exclusive_scan
    from trivium.ops.simplicial import simplicial_attention, simplicial_decode

__all__ = [
    "OnlineScan",
    "document_ids",
    "exclusive_scan",
    "gated_delta_rule",
    "gated_linear_attention",
    "simplicial_attention",
    "simplicial_decode",
]

_HOMES = {
    "OnlineScan": "trivium.ops.scan",
    "document_ids": "trivium.ops.documents",
    "exclusive_scan": "trivium.ops.scan",
    "gated_delta_rule": "trivium.ops.delta_rule",
    "gated_linear_attention": "trivium.ops.linear_attention",
    "simplicial_attention": "trivium.ops.simplicial",
    "simplicial_decode": "trivium.ops.simplicial",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trivium.ops' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
