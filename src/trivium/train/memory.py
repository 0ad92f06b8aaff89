"""Memory: how the C library treats what a training step frees, and the most that a run held on its device."""

import ctypes
import gc
import sys

import torch

# mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let the process keep the memory that a step frees for the next one; say whether the C library could be told.

    By default glibc hands large freed blocks back to the system, and a step on a processor then pays for thousands of
    page faults to get the same megabytes again: 8 of 51 ms at the quickstart's size.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library, musl for one
        return False
    told = [mallopt(_MMAP_THRESHOLD, 1 << 30), mallopt(_TRIM_THRESHOLD, (1 << 31) - 1), mallopt(_TOP_PAD, 1 << 26)]
    return all(told)


def reset_peak(device: torch.device) -> None:
    """Begin to count what a run holds on `device`, and give back what an earlier one of this process left there."""
    if device.type == "cuda":
        torch.cuda.init()  # a process that has asked the device for nothing yet has no counts to reset
        gc.collect()  # models and graphs hold one another in circles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes of tensors that this process held on `device` since `reset_peak`; None on a processor."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
