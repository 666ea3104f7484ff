"""How much memory this process may still take, and how much of it is for the cache."""

from __future__ import annotations

import ctypes
from pathlib import Path

_CACHE_SHARE = 0.5  # of the memory that is left beside the weights; the rest is for activations and other programs


_KEPT = 128 << 20  # bytes of freed memory that stay with the process
_MAPPED = 32 << 20  # bytes from which an allocation is mapped by itself; glibc takes no more than this
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """glibc returns what is freed to the system, which zeroes it page by page when the next step asks for it again: a
    fifth of the torch backend's time for 512 tokens of a 125 M model. Up to 128 MiB stay. Other C libraries: nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Windows, macOS
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
    mallopt(_M_MMAP_THRESHOLD, _MAPPED)


def give_back_memory() -> None:
    """Hands what glibc's heap keeps of freed memory back to the system, holes between what is in use too. Other C
    libraries: nothing."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # Windows, macOS
        return
    trim(0)


def cache_budget(available: int, weight_bytes: int) -> int:
    """Bytes that a model with `weight_bytes` of weights may use for its cache; 0 where not even the weights fit."""
    return max(0, int(_CACHE_SHARE * (available - weight_bytes)))


def available_memory() -> int:
    """Bytes of main memory that can be taken without swapping: the system's, or a container's limit if lower.

    Linux only; elsewhere 8 GiB is assumed, since nothing in the standard library tells.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30
    system = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return system
    if limit == "max":
        return system
    used -= int(usage["active_file"]) + int(usage["inactive_file"])  # cached files give way
    return min(system, max(int(limit) - used, 0))
