"""What the machine can do at most, measured by the native kernels' own loops, and the least time of a column."""

from __future__ import annotations

from protocol import CONTEXT

from maestrale.cli.limits import prefill_operations, step_bytes
from maestrale.config import ModelConfig
from maestrale.native_backend.limits import multiply_rate, read_rate
from maestrale.plan import count_parameters, tensor_plan

BITS = {"int4": 4.5, "int8": 8, "bf16": 16}  # of a weight; an int4 scale for each 32 included


def measure_limits(threads: int) -> dict[str, float | dict[str, float]]:
    """Bytes read a second, and products' operations a second by format."""
    operations = {bits: multiply_rate(threads, bits) for bits in BITS}
    return {"read_bytes_per_second": read_rate(threads), "operations_per_second": operations}


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
