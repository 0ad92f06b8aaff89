"""How the C library treats memory that a training step frees."""

import ctypes
import sys

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
