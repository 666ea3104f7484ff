"""Random weights in every format, with the values that they stand for and the products that they should give.

The expected values are float64 formulas on the codes, the scales and the rows as linear.h defines them.
"""

from dataclasses import dataclass

import numpy as np

from maestrale.checkpoint import packed
from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.native_backend import kernels

FORMATS = ["f32", "bf16", "int8", "int4-32", "int4-64", "int4-128", "int4-32-affine"]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to bfloat16, to nearest with ties to even, as uint16 patterns."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Example:
    """`values` [n, k] float64 are what the weight stands for; `codes` the integers in it, where it has any."""

    name: str
    packed: packed.PackedWeight
    values: np.ndarray

    @property
    def weight(self):
        return kernels.weight(self.packed)


def example(name: str, n: int, k: int, seed: int = 0, extreme: bool = False) -> Example:
    """extreme: only the largest codes of both signs."""
    rng = np.random.default_rng(seed)
    if name == "f32":
        w = rng.standard_normal((n, k), np.float32)
        return Example(name, packed.pack_float(StoredTensor.from_array(w, "F32"), "f32"), w.astype(np.float64))
    if name == "bf16":
        w = to_bf16(rng.standard_normal((n, k), np.float32))
        return Example(name, packed.pack_float(StoredTensor.from_array(w, "BF16"), "bf16"), from_bf16(w).astype(float))
    if name == "int8":
        codes = rng.choice([-128, 127], (n, k)) if extreme else rng.integers(-128, 128, (n, k))
        scales = rng.uniform(0.001, 0.01, n).astype(np.float32)
        values = codes * scales.astype(np.float64)[:, None]
        return Example(name, packed.pack_int8(codes.astype(np.int8), scales), values)
    group = int(name.split("-")[1])
    codes = rng.choice([0, 15], (n, k)) if extreme else rng.integers(0, 16, (n, k))
    scales = rng.uniform(0.001, 0.01, (n, k // group)).astype(np.float16)
    offsets = rng.uniform(-0.1, 0.1, scales.shape).astype(np.float32) if name.endswith("affine") else None
    grouped = codes.reshape(n, -1, group)
    wide = scales.astype(np.float64)[..., None]
    values = (grouped - 8) * wide if offsets is None else grouped * wide + offsets.astype(np.float64)[..., None]
    return Example(name, packed.pack_int4(codes.astype(np.uint8), scales, offsets), values.reshape(n, k))


def rows_seen(name: str, x: np.ndarray) -> np.ndarray:
    """float64 of the rows that a product of this format multiplies with."""
    if name == "f32":
        return x.astype(np.float64)
    if name == "bf16":
        return from_bf16(to_bf16(x)).astype(np.float64)
    most = np.abs(x).max(axis=1, keepdims=True)
    inverse = np.float32(127) / most
    return np.rint(x * inverse).astype(np.float64) * (most / np.float32(127)).astype(np.float64)


def product(pool, isa: str, weight, x: np.ndarray) -> np.ndarray:
    """x [rows, k] times the weight's [n, k] transposed, by the kernels."""
    y = np.empty((len(x), weight.n), np.float32)
    kernels.native.linear(pool, isa, weight, np.ascontiguousarray(x), y)
    return y
