"""The C++ kernels as Python sees them: which set this processor runs, and weights as they take them.

The extension module is built at install (setup.py); where it is missing, `missing()` says so in one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.packed import BLOCK, PackedWeight
from maestrale.errors import UsageError
from maestrale.threads import THREADS

native: Any = None
try:
    native = import_module("maestrale.native_backend._native")
except ImportError as error:
    _why = str(error)

ISA = "MAESTRALE_ISA"  # the environment variable that forces a set


def missing() -> str | None:
    """Why there are no kernels, in one line with the remedy; None where there are."""
    if native is not None:
        return None
    return f"the native backend's kernels are not built ({_why}); install a C++20 compiler and install maestrale again"


def choose_isa(name: str | None = None) -> str:
    """The instruction set to use: `name`, else what MAESTRALE_ISA says, else the fastest that the processor has."""
    if native is None:
        raise UsageError(str(missing()))
    has = native.isas()
    wanted = name or os.environ.get(ISA) or has[0]
    if wanted not in has:
        raise UsageError(f"{ISA}: expected one of {', '.join(has)} on this processor, got {wanted!r}")
    return wanted


def describe() -> str:
    """Which instruction set computes here, and where that is not AMX, why not; or that there are no kernels."""
    if native is None:
        return str(missing())
    isa, problem = choose_isa(), native.amx_problem()
    return isa if problem is None else f"{isa} ({problem})"


@contextmanager
def starting(threads: int) -> Iterator[None]:
    """Round what starts so many threads: UsageError where the system grants fewer."""
    try:
        yield
    except native.ThreadError as error:
        raise UsageError(
            f"threads = {threads}: the system starts no more of them ({error}); take fewer by --threads or {THREADS}"
        ) from None


def pool(threads: int) -> Any:
    """Threads that work together; UsageError where the system grants fewer."""
    with starting(threads):
        return native.Pool(threads)


def weight(packed: PackedWeight) -> Any:
    """A packed weight as the kernels take it: its arrays where they lie, not copied."""
    (n, k), parts = packed.shape, packed.parts
    optional = [parts.get(name) for name in ("scales", "sums", "offsets")]
    return native.Weight(packed.format, n, k, packed.group, parts["data"], *optional)


def pack(pool: Any, rows: NDArray) -> NDArray[np.uint32]:
    """The `data` of a PackedWeight, as words [blocks, words of a row, 16]; the caller views them as the format's type.

    rows [n, k]: float32, uint16 (patterns of bfloat16) or int8.
    """
    n, k = rows.shape
    data = np.empty((-(-n // BLOCK), -(-k * rows.itemsize // 4), BLOCK), np.uint32)
    native.pack(pool, np.ascontiguousarray(rows), data)
    return data
