"""Memory that is free goes back to the system: what the allocators below a server that runs for months must be told."""

from __future__ import annotations

import asyncio
import gc
import os

from maestrale.memory import give_back_memory, keep_rows

# torch on the CPU keeps twice, in oneDNN and above it, what is compiled for each number of rows that a step may have:
# 817 MiB after 400 numbers with the 1024 entries of each. They are read when torch is imported, which is later.
_COMPILED = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

_PERIOD = 10  # seconds after which what nothing refers to any more is looked for, and goes back with what lies free


def prepare() -> None:
    """Before the model is opened."""
    for cache in _COMPILED:
        os.environ.setdefault(cache, "128")
    # Left alone, glibc keeps a heap for each thread, and from the first array that is freed on, up to 32 MiB at once
    # within them: 39 of 88 MiB were free and kept after a thousand mixed requests to a small model.
    keep_rows(heaps=1)


def settle() -> None:
    """When all is loaded: it stays, so the collector need not walk over it again, and looks sooner at what requests
    leave."""
    gc.collect()
    gc.freeze()


async def tend() -> None:
    """For as long as it serves."""
    while True:
        await asyncio.sleep(_PERIOD)
        await asyncio.to_thread(_tidy)


def _tidy() -> None:
    # Sockets and tracebacks that refer to each other: left to itself, the collector lets some hundred requests' lie,
    # and each keeps a piece of the heap from going back. A few milliseconds.
    gc.collect()
    give_back_memory()
