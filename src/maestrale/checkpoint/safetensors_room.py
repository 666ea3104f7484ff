"""The .safetensors format: 8 bytes of header length, a JSON header, then the tensors without gaps.

The header is checked here in full, because the library lets some damage pass (a duplicate key) and names no file
in its errors. Source: the format section of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from maestrale.checkpoint.dtypes import STORAGE
from maestrale.checkpoint.jsonfile import parse_json
from maestrale.checkpoint.tensorfile import Entry, MappedFile, TensorFile
from maestrale.errors import CheckpointError, shown

MAX_HEADER_BYTES = 100_000_000
_MAX_EXTENT = 1 << 63


def open_safetensors(path: str | Path) -> TensorFile:
    """Maps the file and reads its header alone; CheckpointError names the file and what is wrong with it."""
    mapped = MappedFile(path)
    size = len(mapped.data)
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes; a .safetensors file has at least 8 (the header's length)")
    length = int.from_bytes(mapped.data[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header of {length:,} bytes; expected at most {MAX_HEADER_BYTES:,}")
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: header of {length:,} bytes, but the file has only {size - 8:,} after its length"
        )
    header = parse_json(mapped.data[8 : 8 + length].tobytes(), f"{path} (header)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} (header): __metadata__ must map strings to strings")
    data_start = 8 + length
    entries = {name: _entry(name, value, data_start, path) for name, value in header.items()}
    _check_coverage(entries, data_start, size, path)
    return TensorFile(mapped, entries, metadata)


def _entry(name: str, value: Any, data_start: int, path: str | Path) -> Entry:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:40]!r}; expected one of {', '.join(STORAGE)}")
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise CheckpointError(f"{where}: shape {str(shape)[:80]}: expected a list of whole numbers")
    if any(n < 0 for n in shape):
        raise CheckpointError(f"{where}: shape {str(shape)[:80]} has a negative extent")
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) * STORAGE[dtype].itemsize >= _MAX_EXTENT:
        raise CheckpointError(f"{where}: shape {str(shape)[:80]} overflows")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise CheckpointError(f"{where}: data_offsets {str(offsets)[:80]}: expected two whole numbers")
    start, end = offsets
    expected = math.prod(shape) * STORAGE[dtype].itemsize
    if not 0 <= start <= end < _MAX_EXTENT or end - start != expected:
        raise CheckpointError(
            f"{where}: data_offsets {str(offsets)[:80]} do not hold the {expected:,} bytes of {dtype} {shape}"
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + end)


def _check_coverage(entries: dict[str, Entry], data_start: int, size: int, path: str | Path) -> None:
    """The tensors must fill the file, each byte once."""
    reached, before = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            fault = "overlaps" if entry.start < reached else "leaves a hole after"
            where = f"{path}: tensor {shown(name)}"
            raise CheckpointError(f"{where} {fault} {before}: it begins at byte {entry.start:,}, expected {reached:,}")
        reached, before = entry.end, shown(name)
    if reached > size:
        raise CheckpointError(
            f"{path}: truncated: the header describes {reached:,} bytes, the file has {size:,}; download it again"
        )
    if reached < size:
        raise CheckpointError(
            f"{path}: {size - reached:,} trailing bytes: the header describes {reached:,} bytes, the file has {size:,}"
        )
