"""How much memory this process may still take and has taken, how much is for the cache, and what of it goes back."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_CACHE_SHARE = 0.5  # of the memory that is left beside the weights; the rest is for activations and other programs
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


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


def peak_memory() -> int:
    """The most bytes of main memory that this process has held at once so far, mapped weights included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))  # not its launcher's


def keep_freed_memory() -> None:
    """For steps that ask for the same arrays again and again: glibc would hand them back, and the system zeroes them
    page by page when they are asked for; a fifth of the torch backend's time for 512 tokens of a 125 M model."""
    set_allocator(kept=128 << 20, mapped=32 << 20)


def keep_rows(heaps: int | None = None) -> None:
    """For sampling and for answers: arrays of a few rows of logits stay at hand, larger ones go back. Left alone, glibc
    hands back two arrays of 32,000 float64 numbers that are freed at once, and zeroing them anew took two thirds of a
    draw's time. heaps: as in `set_allocator`."""
    set_allocator(kept=8 << 20, mapped=8 << 20, heaps=heaps)


def set_allocator(kept: int, mapped: int, heaps: int | None = None) -> None:
    """kept: free bytes at a heap's end that stay with the process. mapped: bytes, at most 32 MiB, from which an array
    is mapped by itself and goes back as soon as it is freed. heaps: how many at most; None: glibc's own rule, up to
    eight a core. Does nothing where the C library is another than glibc."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_TRIM_THRESHOLD, kept)
        libc.mallopt(_MMAP_THRESHOLD, mapped)
        if heaps is not None:
            libc.mallopt(_ARENA_MAX, heaps)


def give_back_memory() -> None:
    """What lies free between what is used goes back to the system; likewise. Takes some milliseconds."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
