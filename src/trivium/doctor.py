"""Examine the machine: versions, processor and devices, operator backends, extras, and what is registered."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from trivium import __version__
from trivium.mixers.base import MIXERS
from trivium.model.base import MODELS
from trivium.ops.dispatch import abilities, operators
from trivium.study.jobs import available_cores
from trivium.tasks.base import TASKS
from trivium.train.environment import processor_name, source_commit
from trivium.train.precision import choose_device, choose_precision, has_bfloat16

CORE = ("torch", "numpy", "safetensors", "pyyaml", "tyro", "rich", "matplotlib", "jinja2")
# extra -> the modules that it brings, by the name under which they are imported
EXTRAS = {
    "gpu": ("triton", "fla"),
    "hf": ("transformers", "accelerate", "tokenizers", "tiktoken", "pyarrow"),
    "track": ("tensorboard", "wandb", "trackio"),
    "score": ("math_verify", "lm_eval"),
    "gym": ("reasoning_gym",),
    "dev": ("pytest", "hypothesis", "xdist", "ruff", "pyright"),
}


def examine() -> dict[str, Any]:
    """Return the findings as plain data, in the order in which people want them."""
    return {
        "trivium": {"version": __version__, "commit": source_commit() or "not a checkout"},
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in CORE},
        "machine": _machine(),
        "devices": _devices(),
        "automatic choice": _choice(),
        "operators": {name: abilities(name) for name in operators()},
        "extras": {extra: _extra(extra, modules) for extra, modules in EXTRAS.items()},
        "mixers": MIXERS.names(),
        "models": MODELS.names(),
        "tasks": TASKS.names(),
    }


def _machine() -> dict[str, Any]:
    native, reason = has_bfloat16(torch.device("cpu"))
    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "bfloat16": reason if native else f"{reason}, so auto is float32",
        "cores": available_cores(),
        "memory": f"{_memory_bytes() / 2**30:.1f} GiB",
        "torch threads": torch.get_num_threads(),
    }


def _memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or its container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _devices() -> list[str]:
    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = torch.cuda.get_device_capability(index)
        memory = properties.total_memory / 2**30
        found.append(f"cuda:{index}: {properties.name}, {memory:.0f} GiB, compute capability {major}.{minor}")
    return found


def _choice() -> dict[str, str]:
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    return {"device": str(device), "precision": f"{precision.name} ({precision.reason})"}


def _extra(extra: str, modules: tuple[str, ...]) -> str:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return "installed"
    return f"missing {', '.join(missing)}: pip install 'trivium[{extra}]'"
