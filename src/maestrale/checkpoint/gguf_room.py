"""The GGUF format: a header of typed values, then the tensors, each at an aligned offset.

Every count and length is checked against what is left of the file before anything is made of it. Source: the format
description of github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3 (little-endian).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.dtypes import STORAGE
from maestrale.checkpoint.gguf_blocks import BLOCKS
from maestrale.checkpoint.tensorfile import Entry, MappedFile, TensorFile
from maestrale.errors import CheckpointError, shown

MAGIC = b"GGUF"
# The numbers by which files name the types of tensors.
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}
STRING, ARRAY, BOOL = 8, 9, 7
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_MAX_VALUES, _MAX_TENSORS, _MAX_ITEMS = 1 << 16, 1 << 20, 1 << 20  # real files have tens, thousands, and 131,072 tokens
_MAX_STRING = 1 << 24


@dataclass(frozen=True, kw_only=True)
class GgufFile(TensorFile):
    """values: what the header says, by key. types, shapes: of each tensor, the shape outermost first.

    A tensor in blocks is an entry of U8 [..., inputs / block size, bytes of a block].
    """

    values: Mapping[str, Any]
    types: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def open_gguf(path: str | Path) -> GgufFile:
    """Maps the file and reads its header alone; CheckpointError names the file and what is wrong with it."""
    mapped = MappedFile(path)
    cursor = _Cursor(mapped)
    magic, version = cursor.take(4, "the magic").tobytes(), cursor.number("<u4", "the version")
    if magic != MAGIC:
        raise CheckpointError(f"{path}: begins with {magic!r}; a GGUF file begins with {MAGIC!r}")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version}; expected 2 or 3, little-endian")
    n_tensors = cursor.count("<u8", "the number of tensors", _MAX_TENSORS, 24)
    n_values = cursor.count("<u8", "the number of header values", _MAX_VALUES, 13)
    values: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text("a header key")
        if key in values:
            raise CheckpointError(f"{path}: header key {shown(key)} stands twice")
        values[key] = _value(cursor, f"header value {shown(key)}")
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 1 << 20:
        raise CheckpointError(f"{path}: general.alignment = {str(alignment)[:40]}; expected a multiple of 8")
    described = [_tensor(cursor, path) for _ in range(n_tensors)]
    start, size = -(-cursor.at // alignment) * alignment, len(mapped.data)
    entries, types, shapes = {}, {}, {}
    reached, before = start, "the header"
    for name, kind, shape, offset in sorted(described, key=lambda item: item[3]):
        if name in entries:
            raise CheckpointError(f"{path}: tensor {shown(name)} stands twice")
        dtype, stored = (
            ("U8", (*shape[:-1], shape[-1] // BLOCKS[kind][0], BLOCKS[kind][1])) if kind in BLOCKS else (kind, shape)
        )
        first, last = start + offset, start + offset + math.prod(stored) * STORAGE[dtype].itemsize
        if offset % alignment:
            raise CheckpointError(f"{path}: tensor {shown(name)} at {offset:,}, which is no multiple of {alignment}")
        if first < reached:
            raise CheckpointError(f"{path}: tensor {shown(name)} overlaps {before}")
        if last > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {shown(name)} ends at byte {last:,}, the file has {size:,}"
            )
        entries[name], types[name], shapes[name] = Entry(dtype, stored, first, last), kind, shape
        reached, before = last, shown(name)
    return GgufFile(mapped, entries, values=values, types=types, shapes=shapes)


def _value(cursor: _Cursor, what: str) -> Any:
    """A number, bool or string; of an array a numpy array, or a list of strings (as bytes)."""
    kind = cursor.number("<u4", f"the type of {what}")
    if kind == STRING:
        return cursor.text(what)
    if kind in _SCALARS:
        return cursor.take(_width(kind), what).view(_SCALARS[kind])[0].item()
    if kind != ARRAY:
        raise CheckpointError(f"{cursor.path}: {what} has the unknown type {kind}")
    kind = cursor.number("<u4", f"the type of {what}")
    if kind == STRING:
        return [cursor.string(what) for _ in range(cursor.count("<u8", f"the length of {what}", _MAX_ITEMS, 8))]
    if kind not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: {what} is an array of the type {kind}; expected numbers or strings")
    count = cursor.count("<u8", f"the length of {what}", _MAX_ITEMS, _width(kind))
    return cursor.take(count * _width(kind), what).view(_SCALARS[kind])


def _tensor(cursor: _Cursor, path: str | Path) -> tuple[str, str, tuple[int, ...], int]:
    """(name, type, shape outermost first, offset)."""
    name = cursor.text("a tensor's name")
    where = f"{path}: tensor {shown(name)}"
    dims = cursor.number("<u4", f"the dimensions of {shown(name)}")
    if not 1 <= dims <= 4:
        raise CheckpointError(f"{where}: {dims} dimensions; expected 1 to 4")
    shape = tuple(cursor.number("<u8", f"the shape of {shown(name)}") for _ in range(dims))[::-1]
    if math.prod(max(extent, 1) for extent in shape) * 8 >= 1 << 63 or 0 in shape:
        raise CheckpointError(f"{where}: impossible shape {shape}")
    number = cursor.number("<u4", f"the type of {shown(name)}")
    if number not in TYPES:
        raise CheckpointError(f"{where}: type {number}; expected one of {', '.join(TYPES.values())}")
    kind = TYPES[number]
    if kind in BLOCKS and shape[-1] % BLOCKS[kind][0]:
        raise CheckpointError(f"{where}: rows of {shape[-1]} are not cut into {kind}'s blocks of {BLOCKS[kind][0]}")
    return name, kind, shape, cursor.number("<u8", f"the offset of {shown(name)}")


def _width(kind: int) -> int:
    return np.dtype(_SCALARS[kind]).itemsize


class _Cursor:
    """Reads on through the header; CheckpointError where the file ends first."""

    def __init__(self, mapped: MappedFile):
        self._data, self.at, self.path = mapped.data, 0, mapped.path

    def take(self, count: int, what: str) -> NDArray[np.uint8]:
        left = len(self._data) - self.at
        if count > left:
            raise CheckpointError(f"{self.path}: {what} takes {count:,} bytes, but the file has only {left:,} more")
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, kind: str, what: str) -> int:
        return int(self.take(np.dtype(kind).itemsize, what).view(kind)[0])

    def count(self, kind: str, what: str, limit: int, at_least: int) -> int:
        """A number of things of which each takes `at_least` bytes."""
        value = self.number(kind, what)
        left = len(self._data) - self.at
        if value > limit or value * at_least > left:
            raise CheckpointError(
                f"{self.path}: {what} is {value:,}; expected at most {min(limit, left // at_least):,} in this file"
            )
        return value

    def string(self, what: str) -> bytes:
        return self.take(self.count("<u8", f"the length of {what}", _MAX_STRING, 1), what).tobytes()

    def text(self, what: str) -> str:
        try:
            return self.string(what).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8") from None
