"""GGUF's quantized blocks: their bytes → values or packed weights, and back for the two that are written.

Each row of a weight is cut into blocks of 32 or 256 inputs with scales of their own. Source: the structures block_q4_0
… block_q6_K and the functions dequantize_row_* of ggml-common.h and ggml-quants.c (github.com/ggml-org/ggml); the sums
below are in fp32 and in the same order, so values are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.packed import PackedWeight, pack_int4
from maestrale.checkpoint.rounding import int4_codes
from maestrale.errors import CheckpointError

BLOCKS = {  # inputs of a block, its bytes
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
PACKED = ("Q4_0", "Q4_1")  # int4 in groups of 32, symmetric and affine, hold exactly what these do
_CHUNK = 1 << 18  # bytes of blocks worked on at once: bounds the temporaries

Bytes = NDArray[np.uint8]


def read_blocks(kind: str, blocks: Bytes) -> PackedWeight | NDArray[np.float32]:
    """blocks [n, k / size, bytes] of a format in `BLOCKS` → the weight [n, k], packed where `PACKED` says so."""
    n, count, width = blocks.shape
    if kind in PACKED:
        nibbles = blocks[..., -16:]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(n, -1)
        offsets = None if kind == "Q4_0" else _halves(blocks, 2)[..., 0].astype(np.float32)
        return pack_int4(codes, _halves(blocks, 0)[..., 0], offsets)
    values = np.empty((n, count * BLOCKS[kind][0]), np.float32)
    step = max(1, _CHUNK // (count * width))
    for start in range(0, n, step):
        part = blocks[start : start + step]
        values[start : start + step] = _READERS[kind](part).reshape(len(part), -1)
    return values


def write_blocks(kind: str, values: NDArray[np.float32]) -> Bytes:
    """values [n, k] → blocks [n, k / 32, bytes] of Q8_0, rounded as the format's own tools do, or of Q4_0, on scales
    that are sought (rounding.py). CheckpointError where a scale is beyond float16."""
    if kind == "Q4_0":
        return q4_0_blocks(*int4_codes(values, 32))
    grouped = values.reshape(len(values), -1, 32)
    scales = np.abs(grouped).max(axis=-1, keepdims=True) / np.float32(127)
    steps = grouped * np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps)  # halves away from zero
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CheckpointError("NaN, Inf, or values whose scale is beyond float16")
    return np.concatenate([halves.view(np.uint8), codes.astype(np.int8).view(np.uint8)], axis=-1)


def q4_0_blocks(codes: NDArray[np.uint8], scales: NDArray[np.float16]) -> Bytes:
    """codes [n, k] from 0 to 15, scales [n, k / 32]: w = (code - 8) * scale."""
    grouped = codes.reshape(*scales.shape, 2, 16)
    halves = np.ascontiguousarray(scales, "<f2")[..., None].view(np.uint8)
    return np.concatenate([halves, grouped[..., 0, :] | grouped[..., 1, :] << 4], axis=-1)


def _halves(blocks: Bytes, start: int) -> NDArray[np.float16]:
    """The float16 that begins at byte `start` of each block, [..., 1]."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")


def _wide(blocks: Bytes, start: int) -> NDArray[np.float32]:
    return _halves(blocks, start).astype(np.float32)


def _bits(bytes: Bytes, shifts: range, mask: int) -> Bytes:
    """[..., b] → [..., len(shifts), b]: the masked bits of every byte at each shift."""
    shifted: Bytes = bytes[..., None, :] >> np.array(shifts, np.uint8)[:, None]
    return shifted & np.uint8(mask)


def _q5_0(blocks: Bytes) -> NDArray[np.float32]:
    low = _bits(blocks[..., 6:], range(0, 8, 4), 15).reshape(*blocks.shape[:-1], 32)
    high = np.unpackbits(np.ascontiguousarray(blocks[..., 2:6]), axis=-1, bitorder="little")
    return _wide(blocks, 0) * ((low | high << 4).astype(np.float32) - 16)


def _q8_0(blocks: Bytes) -> NDArray[np.float32]:
    return _wide(blocks, 0) * blocks[..., 2:].view(np.int8).astype(np.float32)


def _k_scales(packed: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """12 bytes → eight scales and eight minima of 6 bits, [..., 8]."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _affine_k(blocks: Bytes, codes: Bytes) -> NDArray[np.float32]:
    """codes [..., 8, 32] on the scales and minima of eight groups."""
    scales, minima = _k_scales(blocks[..., 4:16])
    scales, minima = _wide(blocks, 0) * scales, _wide(blocks, 2) * minima
    return scales[..., None] * codes.astype(np.float32) - minima[..., None]


def _nibbles(bytes: Bytes) -> Bytes:
    """128 bytes → [..., 8, 32]: of each 32 bytes the low nibbles, then the high ones."""
    fours = bytes.reshape(*bytes.shape[:-1], 4, 32)
    return _bits(fours, range(0, 8, 4), 15).reshape(*bytes.shape[:-1], 8, 32)


def _q4_k(blocks: Bytes) -> NDArray[np.float32]:
    return _affine_k(blocks, _nibbles(blocks[..., 16:]))


def _q5_k(blocks: Bytes) -> NDArray[np.float32]:
    high = _bits(blocks[..., 16:48], range(8), 1)
    return _affine_k(blocks, _nibbles(blocks[..., 48:]) | high << np.uint8(4))


def _q6_k(blocks: Bytes) -> NDArray[np.float32]:
    shape = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*shape, 2, 64)
    low = _bits(low, range(0, 8, 4), 15).reshape(*shape, 2, 4, 32)  # low and high nibbles of 64 bytes
    high = _bits(blocks[..., 128:192].reshape(*shape, 2, 32), range(0, 8, 2), 3)
    codes = (low | high << 4).astype(np.int8) - np.int8(32)
    scales = blocks[..., 192:208].view(np.int8).astype(np.float32).reshape(*shape, 16, 1)
    return (_wide(blocks, 208)[..., None] * scales) * codes.reshape(*shape, 16, 16).astype(np.float32)


_READERS: dict[str, Callable[[Bytes], NDArray[np.float32]]] = {
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
