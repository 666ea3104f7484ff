"""Memory that is free goes back to the system: what the allocators below a server that runs for months must be told."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os

# torch on the CPU keeps twice, in oneDNN and above it, what is compiled for each number of rows that a step may have:
# 817 MiB after 400 numbers with the 1024 entries of each. They are read when torch is imported, which is later.
_COMPILED = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

# glibc's malloc.h: left alone it keeps a heap for each thread, and from the first array that is freed on, up to 32 MiB
# at once within them: 39 of 88 MiB were free and kept after a thousand mixed requests to a small model.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE = 8 << 20  # bytes: a step's logits are seldom more and stay at hand, those of a whole prompt are and go back
_PERIOD = 10  # seconds after which what lies free between what is used goes back too: a walk of some milliseconds


def prepare() -> None:
    """Before the model is opened. Does nothing where the C library is another than glibc."""
    for cache in _COMPILED:
        os.environ.setdefault(cache, "128")
    libc = _glibc()
    if libc is not None:
        for name, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _LARGE)):
            libc.mallopt(name, value)


def settle() -> None:
    """When all is loaded: it stays, so the collector need not walk over it again, and looks sooner at what requests
    leave."""
    gc.collect()
    gc.freeze()


async def tend() -> None:
    """For as long as it serves."""
    libc = _glibc()
    while libc is not None:
        await asyncio.sleep(_PERIOD)
        await asyncio.to_thread(libc.malloc_trim, 0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
