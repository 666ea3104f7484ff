"""What the machine can do at most, measured by the native kernels' own loops, and the least time of a column."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from kernels import memory
from protocol import CONTEXT

from maestrale.cli.limits import prefill_operations, step_bytes
from maestrale.config import ModelConfig
from maestrale.native_backend import kernels
from maestrale.plan import count_parameters, tensor_plan

BITS = {"int4": 4.5, "int8": 8, "bf16": 16}  # of a weight; an int4 scale for each 32 included
_AREA, _PIECE, _PRODUCTS = 1 << 28, 8 << 20, 1_000_000


def measure_limits(threads: int) -> dict[str, float | dict[str, float]]:
    """The best of several: bytes read a second from 256 MB on large pages, products' operations a second by format."""
    isa = kernels.choose_isa()
    native, pool = kernels.native, kernels.native.Pool(threads)
    area = memory(_AREA)

    def read() -> None:
        for at in range(0, _AREA, _PIECE):
            native.read_limit(pool, isa, area[at : at + _PIECE])

    operations = {}
    for bits in BITS:
        done = native.multiply_limit(pool, isa, bits, _PRODUCTS)
        operations[bits] = done / best(partial(native.multiply_limit, pool, isa, bits, _PRODUCTS))
    return {"read_bytes_per_second": _AREA / best(read), "operations_per_second": operations}


def best(run: Callable[[], object], times: int = 8) -> float:
    """The least seconds that a call took."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(seconds() for _ in range(times))


def least_seconds(config: ModelConfig, kind: str, bits: str, machine: dict) -> float:
    """Of a pre-fill or a decode step: no machine that reads and multiplies so fast can be faster."""
    what, size = kind.split()
    rate = machine["operations_per_second"][bits]
    if what == "prefill":
        return prefill_operations(config, int(size)) / rate
    tensor_bytes = {name: tensor.size * BITS[bits] / 8 for name, tensor in tensor_plan(config).items()}
    read = step_bytes(config, int(size), CONTEXT, 2, tensor_bytes) / machine["read_bytes_per_second"]
    active = count_parameters(config)[1] - config.vocab_size * config.dim
    return max(read, 2 * int(size) * active / rate)
