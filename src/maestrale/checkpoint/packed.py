"""A linear layer's weight as the native kernels read it: the definition, in numpy, of the layout of linear.h.

Outputs lie together in blocks of 16; rows are padded with zeros to a multiple of 16. With b = n / 16, rounded up:

  f32   data float32 [b, k, 16]
  bf16  data uint16  [b, k/2, 16, 2]   k padded with zeros to a multiple of 2; the patterns of bfloat16
  int8  data int8    [b, k/4, 16, 4]   k padded with zeros to a multiple of 4; w = q * scales
        scales float32 [16 b], sums int32 [16 b]: of a row's q
  int4  data uint8   [b, k/8, 16, 4]   of the inputs 8 i … 8 i + 7: low nibbles the first four, high nibbles the others
        scales float16 [b, k/group, 16]; symmetric: w = (q - 8) * scale
        offsets float32 [b, k/group, 16], affine only: w = q * scale + offset
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.dtypes import StoredTensor, cast

BLOCK = 16
GROUPS = (32, 64, 128)
MIDDLE = 8  # what a symmetric int4 code of 0 stands at
_ROWS = 1024  # dequantized at once, a multiple of BLOCK: bounds the temporaries


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [n, k] = `shape` of n outputs and k inputs. group: inputs that share a scale, int4 only, else 0."""

    format: str
    shape: tuple[int, int]
    data: NDArray
    group: int = 0
    scales: NDArray | None = None
    sums: NDArray | None = None
    offsets: NDArray | None = None

    @property
    def parts(self) -> dict[str, NDArray]:
        """The arrays that it has, by name."""
        found = {"data": self.data, "scales": self.scales, "sums": self.sums, "offsets": self.offsets}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.parts.values())


def part_layout(format: str, shape: tuple[int, int], group: int = 0, affine: bool = False) -> dict[str, tuple]:
    """Name → (dtype as safetensors calls it, shape) of each part; the caller has checked that group divides k."""
    (n, k), dtypes = shape, {"f32": "F32", "bf16": "BF16", "int8": "I8", "int4": "U8"}
    blocks = -(-n // BLOCK)
    inside = {
        "f32": (k, BLOCK),
        "bf16": (-(-k // 2), BLOCK, 2),
        "int8": (-(-k // 4), BLOCK, 4),
        "int4": (k // 8, BLOCK, 4),
    }
    parts: dict[str, tuple] = {"data": (dtypes[format], (blocks, *inside[format]))}
    if format == "int8":
        parts |= {"scales": ("F32", (blocks * BLOCK,)), "sums": ("I32", (blocks * BLOCK,))}
    if format == "int4":
        parts["scales"] = ("F16", (blocks, k // group, BLOCK))
        if affine:
            parts["offsets"] = ("F32", (blocks, k // group, BLOCK))
    return parts


def pack_float(tensor: StoredTensor, format: str) -> PackedWeight:
    """A stored weight [n, k], cast to f32 or bf16."""
    n, k = tensor.shape
    rows = cast(tensor, {"f32": "F32", "bf16": "BF16"}[format]).array
    width = {"f32": 1, "bf16": 2}[format]
    data = _blocks(rows, width)
    return PackedWeight(format, (n, k), data[..., 0] if format == "f32" else data)


def pack_int8(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> PackedWeight:
    """codes [n, k], scales [n]: w = codes * scales."""
    n, k = codes.shape
    padding = (0, -n % BLOCK)
    sums = codes.sum(axis=1, dtype=np.int32)
    return PackedWeight(
        "int8", (n, k), _blocks(codes, 4), scales=np.pad(scales.astype(np.float32), padding), sums=np.pad(sums, padding)
    )


def pack_int4(
    codes: NDArray[np.uint8], scales: NDArray[np.float16], offsets: NDArray[np.float32] | None = None
) -> PackedWeight:
    """codes [n, k] from 0 to 15, scales [n, k / group], offsets likewise or None: see above."""
    n, k = codes.shape
    group = k // scales.shape[1]
    if k != group * scales.shape[1] or group % 8:
        raise ValueError(f"{k} inputs and {scales.shape[1]} groups: a group must be a multiple of 8 inputs")
    eights = _blocks(codes, 8)
    return PackedWeight(
        "int4",
        (n, k),
        eights[..., :4] | eights[..., 4:] << 4,
        group,
        scales=_group_blocks(scales.astype(np.float16)),
        offsets=None if offsets is None else _group_blocks(offsets.astype(np.float32)),
    )


def concatenate(weights: list[PackedWeight]) -> PackedWeight:
    """Weights of one format one above the other; all but the last have a multiple of 16 rows."""
    first = weights[0]
    if any(weight.shape[0] % BLOCK for weight in weights[:-1]):
        raise ValueError(f"all but the last need a multiple of {BLOCK} rows")
    parts = {name: np.concatenate([weight.parts[name] for weight in weights]) for name in first.parts}
    return PackedWeight(
        first.format, (sum(weight.shape[0] for weight in weights), first.shape[1]), group=first.group, **parts
    )


def unpack(weight: PackedWeight) -> tuple[NDArray, NDArray | None, NDArray | None]:
    """(elements [n, k], scales, offsets) as the functions above take them; elements of f32 and bf16 are the values
    themselves (uint16 patterns), without scales."""
    (n, k), data = weight.shape, weight.data
    if weight.format == "int4":
        data = np.concatenate([data & 15, data >> 4], axis=-1)
    elif weight.format == "f32":
        data = data[..., None]
    elements = data.swapaxes(1, 2).reshape(data.shape[0] * BLOCK, -1)[:n, :k]
    if weight.scales is None:
        return elements, None, None
    if weight.format == "int8":
        return elements, weight.scales[:n], None
    scales = _group_rows(weight.scales, n)
    return elements, scales, None if weight.offsets is None else _group_rows(weight.offsets, n)


def dequantize(weight: PackedWeight) -> NDArray[np.float32]:
    """The values [n, k] that the weight stands for, as fp32 products and sums give them."""
    n, k = weight.shape
    values = np.empty((n, k), np.float32)
    for start in range(0, n, _ROWS):
        values[start : start + _ROWS] = _dequantize(_slice(weight, start, min(start + _ROWS, n)))
    return values


def _dequantize(weight: PackedWeight) -> NDArray[np.float32]:
    elements, scales, offsets = unpack(weight)
    if weight.format == "f32":
        return elements
    if weight.format == "bf16":
        return cast(StoredTensor.from_array(elements, "BF16"), "F32").array
    assert scales is not None  # for the type checker: the two formats left have them
    if weight.format == "int8":
        return elements * scales[:, None]
    grouped = elements.reshape(weight.shape[0], -1, weight.group).astype(np.float32)
    wide = scales.astype(np.float32)[..., None]
    values = (grouped - MIDDLE) * wide if offsets is None else grouped * wide + offsets[..., None]
    return values.reshape(weight.shape)


def _slice(weight: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Rows start … stop - 1, views; start is a multiple of BLOCK."""
    blocks = slice(start // BLOCK, -(-stop // BLOCK))
    rows = slice(start, blocks.stop * BLOCK)
    parts = {name: array[rows if array.ndim == 1 else blocks] for name, array in weight.parts.items()}
    return PackedWeight(weight.format, (stop - start, weight.shape[1]), group=weight.group, **parts)


def _blocks(rows: NDArray, width: int) -> NDArray:
    """[n, k] → [n/16, k/width, 16, width], zeros where there is nothing."""
    n, k = rows.shape
    padded = np.pad(rows, ((0, -n % BLOCK), (0, -k % width)))
    return np.ascontiguousarray(padded.reshape(-1, BLOCK, padded.shape[1] // width, width).swapaxes(1, 2))


def _group_blocks(rows: NDArray) -> NDArray:
    """[n, groups] → [n/16, groups, 16]."""
    return _blocks(rows, 1)[..., 0]


def _group_rows(blocks: NDArray, n: int) -> NDArray:
    return blocks.swapaxes(1, 2).reshape(-1, blocks.shape[1])[:n]
