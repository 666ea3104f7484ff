"""How much memory this process may still take, and how much of it is for the cache."""

from __future__ import annotations

from pathlib import Path

_CACHE_SHARE = 0.5  # of the memory that is left beside the weights; the rest is for activations and other programs


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
