"""A tensor as a file stores it, and the casts between the three float formats of weights.

numpy has no bfloat16, so a BF16 tensor's elements are its 16-bit patterns (the upper half of a float32's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestrale.errors import CheckpointError, UsageError

# The safetensors names of dtypes that fill whole bytes → the numpy dtype that holds one element's bits.
STORAGE = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
WEIGHT_DTYPES = ("BF16", "F16", "F32")
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_SPELLINGS = {torch_name: name for name, torch_name in TORCH_NAMES.items()} | {
    "bf16": "BF16",
    "fp16": "F16",
    "fp32": "F32",
}
_CHUNK = 1 << 22  # elements cast at once, so that the temporaries of a cast stay under 64 MB


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """dtype: a safetensors name, a key of `STORAGE`. data: uint8 [bytes], row-major elements, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @classmethod
    def from_array(cls, array: NDArray, dtype: str) -> StoredTensor:
        """array: elements of `STORAGE[dtype]` (uint16 patterns for BF16); copied only where it is not contiguous."""
        flat = np.ascontiguousarray(array, dtype=STORAGE[dtype]).reshape(-1)
        return cls(dtype, tuple(array.shape), flat.view(np.uint8))

    @property
    def array(self) -> NDArray:
        """The elements [*shape], a view; of `STORAGE[dtype]`, so uint16 patterns for BF16."""
        return self.data.view(STORAGE[self.dtype]).reshape(self.shape)


def read_dtype(word: str, auto: str) -> str:
    """A weight dtype as people spell it (float32, bf16 …) → its safetensors name; "auto" → `auto`."""
    if word != "auto" and word not in _SPELLINGS:
        raise UsageError(f"dtype {word!r}: expected auto, {', '.join(_SPELLINGS)}")
    return auto if word == "auto" else _SPELLINGS[word]


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * STORAGE[dtype].itemsize


def cast(tensor: StoredTensor, dtype: str) -> StoredTensor:
    """Between BF16, F16 and F32, rounding to nearest, ties to even; NaN stays NaN, too large for F16 becomes Inf."""
    if tensor.dtype == dtype:
        return tensor
    source = tensor.data.view(_weight_storage(tensor.dtype))
    result = np.empty(len(source), _weight_storage(dtype))
    for start in range(0, len(result), _CHUNK):
        part = source[start : start + _CHUNK]
        values = _widen(part) if tensor.dtype == "BF16" else part.astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            result[start : start + _CHUNK] = _narrow(values) if dtype == "BF16" else values
    return StoredTensor(dtype, tensor.shape, result.view(np.uint8))


def is_finite(tensor: StoredTensor) -> bool:
    """Whether a BF16, F16 or F32 tensor holds neither NaN nor Inf: those have all bits of the exponent set."""
    _weight_storage(tensor.dtype)
    bits = tensor.data.view("<u4" if tensor.dtype == "F32" else "<u2")
    exponent = bits.dtype.type({"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[tensor.dtype])
    chunks = (bits[start : start + _CHUNK] for start in range(0, len(bits), _CHUNK))
    return not any(((chunk & exponent) == exponent).any() for chunk in chunks)


def _weight_storage(dtype: str) -> np.dtype:
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"weights of dtype {dtype}: expected one of {', '.join(WEIGHT_DTYPES)}")
    return STORAGE[dtype]


def _widen(patterns: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    # Adding half of the last kept place, less one bit when that place is even, rounds ties to even.
    upper = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    # A NaN whose payload lies in the dropped half would turn into Inf: set the quiet bit instead of rounding.
    quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return np.where(np.isnan(values), quiet, upper)
