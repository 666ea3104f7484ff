"""Packed folders: params.json and packed.safetensors, whose bytes a kernel reads as they lie in the mapped file.

packed.safetensors is an ordinary .safetensors file. Its metadata holds one key, `maestrale.packed`: JSON with
`version` and `weights`, from the canonical name of each quantized weight to {"format": "int8"}, or
{"format": "int4", "group": 32, "affine": false}. Such a weight is stored as its parts, `NAME.data`, `NAME.scales`,
and `NAME.sums` (int8) or `NAME.offsets` (affine int4), of the dtypes and shapes of packed.py; every other weight is a
plain tensor. Every tensor begins at a multiple of 64 bytes; tensors named `pad.0`, `pad.1` … fill what lies between.

A model with tied embeddings becomes one whose head is a matrix of its own: quantized, it differs from the embeddings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.dtypes import StoredTensor, byte_count
from maestrale.checkpoint.jsonfile import parse_json
from maestrale.checkpoint.packed import GROUPS, PackedWeight, part_layout
from maestrale.checkpoint.place import Part, Place, QuantizedPlace, same_place
from maestrale.checkpoint.tensorfile import TensorFile
from maestrale.config import ModelConfig
from maestrale.errors import CheckpointError
from maestrale.plan import tensor_plan

CONFIG = "params.json"
WEIGHTS = "packed.safetensors"
INDEX = ""  # it is always one file
IGNORED = re.compile(r"pad\.\d+")
METADATA = "maestrale.packed"
VERSION = 1
ALIGNMENT = 64
_LINEAR = tuple(f".{layer}.weight" for layer in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def is_linear(name: str) -> bool:
    """Whether a canonical tensor is a linear layer's weight, which may be quantized: no norm, embedding or router."""
    return name == "output.weight" or name.endswith(_LINEAR)


def places(config: ModelConfig, file: TensorFile) -> dict[str, Place | QuantizedPlace]:
    """Canonical name → where it is; CheckpointError where the description is not one of this version."""
    described = _description(file)
    found: dict[str, Place | QuantizedPlace] = {}
    for name, tensor in tensor_plan(config).items():
        if name in described:
            found[name] = _quantized(file.path, name, tensor.shape, described.pop(name))
        else:
            found[name] = same_place(name, tensor)
    if described:
        raise CheckpointError(
            f"{file.path} (metadata): describes weights that {CONFIG} has no place for: {_few(described)}"
        )
    return found


def description(weights: dict[str, tuple[str, int, bool]]) -> dict[str, str]:
    """The file's metadata. weights: name → (format, group, affine)."""
    described = {
        name: {"format": format} | ({"group": group, "affine": affine} if format == "int4" else {})
        for name, (format, group, affine) in weights.items()
    }
    return {METADATA: json.dumps({"version": VERSION, "weights": described}, separators=(",", ":"))}


def aligned(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, and after each whose end is no multiple of 64 bytes a `pad` that makes it one."""
    for number, (name, dtype, shape) in enumerate(entries):
        yield name, dtype, shape
        if gap := -byte_count(dtype, shape) % ALIGNMENT:
            yield f"pad.{number}", "U8", (gap,)


def is_padding(name: str) -> bool:
    return IGNORED.fullmatch(name) is not None


def padding(shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor.from_array(np.zeros(shape, np.uint8), "U8")


def _description(file: TensorFile) -> dict[str, Any]:
    where = f"{file.path} (metadata)"
    if METADATA not in file.metadata:
        raise CheckpointError(f"{where}: no {METADATA}; expected a file that  maestrale quantize  wrote")
    value = parse_json(file.metadata[METADATA].encode(errors="surrogatepass"), where)
    version, weights = value.get("version"), value.get("weights")
    if version != VERSION or type(version) is not int:
        raise CheckpointError(
            f"{where}: version {str(version)[:40]!r}; this program reads version {VERSION}; quantize again"
        )
    if not isinstance(weights, dict) or not all(isinstance(item, dict) for item in weights.values()):
        raise CheckpointError(f"{where}: expected weights, from names to their formats")
    return weights


def _quantized(path: Path, name: str, shape: tuple[int, ...], value: dict[str, Any]) -> QuantizedPlace:
    where = f"{path} (metadata): {name}"
    format, group, affine = value.get("format"), value.get("group", 0), value.get("affine", False)
    if not is_linear(name):
        raise CheckpointError(f"{where}: is no linear layer's weight; only those are quantized")
    if format not in ("int8", "int4"):
        raise CheckpointError(f"{where}: format {str(format)[:40]!r}; expected int8 or int4")
    if not isinstance(affine, bool) or type(group) is not int or (group in GROUPS) != (format == "int4"):
        raise CheckpointError(
            f"{where}: group {str(group)[:40]}, affine {str(affine)[:40]}; expected a group of "
            f"{', '.join(map(str, GROUPS))} and true or false for int4, neither for int8"
        )
    n, k = shape
    if group and k % group:
        raise CheckpointError(f"{where}: groups of {group} do not divide its {k} inputs")
    layout = part_layout(format, (n, k), group, affine)
    parts = tuple(Part(f"{name}.{part}", (dtype,), extents) for part, (dtype, extents) in layout.items())
    bits = 8 * sum(byte_count(dtype, extents) for dtype, extents in layout.values()) / (n * k)
    read = partial(_weight, format=format, shape=(n, k), group=group, names=tuple(layout))
    return QuantizedPlace(format, shape, parts, bits, format, read)


def _weight(
    arrays: list[NDArray], format: str, shape: tuple[int, int], group: int, names: tuple[str, ...]
) -> PackedWeight:
    return PackedWeight(format, shape, group=group, **dict(zip(names, arrays, strict=True)))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
