"""What this machine can do at most, by the kernels' own loops: bytes read, and products, a second."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from maestrale.native_backend.kernels import choose_isa, native, pool

_AREA, _PIECE, _PRODUCTS, _TIMES = 1 << 28, 8 << 20, 1_000_000, 8


def read_rate(threads: int) -> float:
    """Bytes a second from 256 MiB of memory, on large pages where the system has them; the best of several."""
    isa, workers, room = choose_isa(), pool(threads), mmap.mmap(-1, _AREA)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    area = np.frombuffer(room, np.uint8)
    area[:] = 1  # written once, so that each page is one of its own

    def read() -> None:
        for at in range(0, _AREA, _PIECE):
            native.read_limit(workers, isa, area[at : at + _PIECE])

    return _AREA / _least_seconds(read)


def multiply_rate(threads: int, weights: str) -> float:
    """Operations a second (a multiplication and an addition are two) with weights of this format (packed.py)."""
    run = partial(native.multiply_limit, pool(threads), choose_isa(), weights, _PRODUCTS)
    return run() / _least_seconds(run)


def _least_seconds(run: Callable[[], object]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(seconds() for _ in range(_TIMES))
