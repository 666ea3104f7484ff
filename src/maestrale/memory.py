"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path


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
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
    except OSError:
        return system
    return system if limit == "max" else min(system, max(int(limit) - int(used), 0))
