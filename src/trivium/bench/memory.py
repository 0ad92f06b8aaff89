"""Peak memory of what runs between two calls: of the device's allocator, or of this process."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch


def wait(device: str | torch.device) -> None:
    """Wait until the device has done what it was given."""
    if str(device) != "cpu":
        torch.accelerator.synchronize()


def memory_now(device: str | torch.device) -> int:
    """Return the bytes in use, and let the peak be counted from here."""
    if str(device) != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _give_back()
    try:
        # Loading the libraries took more than they keep: without this, that peak would hide a small operator's.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return memory_peak(device)
    return _resident("VmRSS")


def memory_peak(device: str | torch.device) -> int:
    """Return the most bytes that were in use since `memory_now`."""
    if str(device) != "cpu":
        return torch.cuda.max_memory_allocated()
    try:
        return _resident("VmHWM")
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _give_back() -> None:
    """Return what is free to the system, where its library can: memory used again would not count as new."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
