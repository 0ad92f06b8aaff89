"""What a run depends on beside its recipe: versions, machine, commit, operator backends."""

import logging
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trivium
from trivium.ops.dispatch import chosen

_log = logging.getLogger("trivium")


def processor_name() -> str:
    """Return the model name of the processor."""
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or that of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def source_commit() -> str | None:
    """Return the commit of the checkout that this program runs from ("+changes" if edited); None outside of one."""
    folder = Path(trivium.__file__).parent
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=folder, check=True, capture_output=True
        )
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "."], cwd=folder, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.returncode else "")


def tell_changes(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> None:
    """Warn of each operator whose backend is not the one of the run's record, as when a run is continued elsewhere."""
    for name, choice in sorted(now.items()):
        recorded = before.get(name, choice)["backend"]
        if recorded != choice["backend"]:
            _log.warning(
                "operator %s: this run began with backend %s and continues with %s (%s), which rounds differently",
                *(name, recorded, choice["backend"], choice["reason"]),
            )


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions, machine, commit, command line and the backend of every operator chosen so far, and why."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trivium": trivium.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
        "processor": processor_name(),
        "device": str(device),
        "device_name": device_name(device),
        "commit": source_commit(),
        "command": shlex.join(sys.argv),
        "operators": chosen(),
    }
