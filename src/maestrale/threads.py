"""How many threads compute: as asked for, or one for each core to be had."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from maestrale.errors import UsageError

THREADS = "MAESTRALE_THREADS"  # the environment variable that says how many threads compute
MAX_THREADS = 1024
_CROWD = 4  # threads on a core, beyond which it is a slip
_SHARE = Path("/sys/fs/cgroup/cpu.max")  # a container's: microseconds of time, or "max", in so many of the clock's


def choose_threads(asked: int | None = None, processes: int = 1) -> int:
    """How many threads compute: as asked, else what MAESTRALE_THREADS says, else one for each core to be had, divided
    among so many processes."""
    given = asked
    if asked is None and (word := os.environ.get(THREADS)):
        if not word.isascii() or not word.isdigit() or not 0 < int(word) <= MAX_THREADS:
            raise UsageError(f"{THREADS}={word}: expected a whole number from 1 to {MAX_THREADS}")
        given = int(word)
    if asked is not None and not 0 < asked <= MAX_THREADS:
        raise UsageError(f"threads = {asked}: expected a whole number from 1 to {MAX_THREADS}")
    cores = available_cores()
    if given is not None and given > _CROWD * cores:
        warnings.warn(f"{given} threads on {cores} cores wait for one another: {cores} would be faster", stacklevel=2)
    return given or max(1, min(cores // processes, MAX_THREADS))


def available_cores() -> int:
    """The cores this process may use: those it is bound to, or fewer where a container's share of time is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _SHARE.read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
