"""Writing a model as one GGUF file that llama.cpp runs, in bounded memory, whole or not at all."""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint import gguf
from maestrale.checkpoint.classifier import LABELS, is_classifier
from maestrale.checkpoint.dtypes import STORAGE, StoredTensor, cast, is_finite
from maestrale.checkpoint.folder import GGUF
from maestrale.checkpoint.gguf_blocks import BLOCKS, q4_0_blocks, write_blocks
from maestrale.checkpoint.gguf_room import ARRAY, BOOL, MAGIC, STRING, TYPES
from maestrale.checkpoint.gguf_vocab import SentencePieces, from_file, from_gguf, to_header
from maestrale.checkpoint.packed import BLOCK, unpack
from maestrale.checkpoint.packed_room import is_linear
from maestrale.checkpoint.reader import Checkpoint, open_checkpoint
from maestrale.checkpoint.writer import Progress, atomic_file, require_space, writing
from maestrale.errors import CheckpointError, ConfigError, UsageError
from maestrale.plan import tensor_plan
from maestrale.text.tokenizer import load_tokenizer

FORMATS = {"bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_FILE_TYPES = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}  # enum llama_ftype of llama.h
_UINT32, _FLOAT32, _INT32 = 4, 6, 5
_ALIGNMENT, _CHUNK = 32, 1 << 20  # weights turned into blocks at once


@dataclass(frozen=True)
class _Tensor:
    """name, kind, shape: as the file has them. sources: the canonical tensors that it holds one after the other."""

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: list[str]

    @property
    def size(self) -> int:
        if self.kind in BLOCKS:
            return math.prod(self.shape) // BLOCKS[self.kind][0] * BLOCKS[self.kind][1]
        return math.prod(self.shape) * STORAGE[self.kind].itemsize


def convert_to_gguf(
    src: str | Path,
    dst: str | Path,
    weights: str = "bf16",
    force: bool = False,
    ignore_unexpected: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the model in folder `src` as the file `dst`, with its SentencePiece vocabulary.

    weights: of the linear layers, a key of `FORMATS`; embeddings and head are then Q8_0 at the least, norms and
    routers F32; a layer whose inputs are no multiple of 32 stays BF16. int4 weights in groups of 32 become Q4_0 as
    they are. progress(bytes done, bytes in all) is called after each tensor.
    Errors: as `convert`; ConfigError for windows that differ between layers, UsageError for a classifier: the format
    has no words for them.
    """
    if weights not in FORMATS:
        raise UsageError(f"weights {weights!r}: expected {', '.join(FORMATS)}")
    if Path(dst).suffix != GGUF:
        raise UsageError(f"{dst}: expected a file name that ends in .gguf")
    if os.path.realpath(src) == os.path.realpath(dst):
        raise UsageError(f"{dst}: is the source too; name another file for the output")
    with open_checkpoint(src, ignore_unexpected) as source, atomic_file(dst, force) as partial:
        _write(source, partial, FORMATS[weights], progress)
        source.verify_unchanged()


def _write(source: Checkpoint, path: Path, weights: str, progress: Progress | None) -> None:
    tensors = _tensors(source, weights)
    header = _header(source, weights, tensors)
    total, done = sum(tensor.size for tensor in tensors), 0
    require_space(path, len(header) + total + _ALIGNMENT * len(tensors))
    with writing(path) as write:
        write(header)
        for tensor in tensors:
            for name in tensor.sources:
                for part in _parts(source, name, tensor.kind):
                    write(part)
                source.release(name)
            write(bytes(-tensor.size % _ALIGNMENT))
            done += tensor.size
            if progress is not None:
                progress(done, total)


def _tensors(source: Checkpoint, weights: str) -> list[_Tensor]:
    """The file's tensors in order; experts of a layer and matrix are one."""
    found: dict[str, _Tensor] = {}
    for name, plan in tensor_plan(source.config).items():
        kind = weights
        if len(plan.shape) == 1 or name.endswith("gate.weight"):
            kind = "F32"
        elif weights in BLOCKS and plan.shape[-1] % 32:
            kind = "BF16"
        elif weights == "Q4_0" and (name == "output.weight" or not is_linear(name)):
            kind = "Q8_0"
        stored = gguf.gguf_name(name)
        sources = [*(found[stored].sources if stored in found else []), name]
        shape = (len(sources), *plan.shape) if ".experts." in name else plan.shape
        found[stored] = _Tensor(stored, kind, shape, sources)
    return list(found.values())


def _parts(source: Checkpoint, name: str, kind: str) -> Iterator[NDArray[np.uint8]]:
    """The bytes of one canonical tensor, a few MB at a time."""
    packed = source.packed(name) if kind == "Q4_0" else None
    if packed is not None and packed.format == "int4" and packed.group == 32 and packed.offsets is None:
        codes, scales, _ = unpack(packed)
        assert scales is not None  # for the type checker: int4 has them
        yield q4_0_blocks(codes, scales)
        return
    tensor = source.tensor(name)
    if not is_finite(tensor):
        raise CheckpointError(f"{source.folder}: NaN or Inf in {name}; inspect --check-tensors lists all such")
    rows = max(1, _CHUNK // tensor.shape[-1] // BLOCK) * BLOCK
    for start in range(0, tensor.shape[0], rows):
        part = StoredTensor.from_array(tensor.array[start : start + rows], tensor.dtype)
        if kind in BLOCKS:
            try:
                yield write_blocks(kind, cast(part, "F32").array)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from None
        else:
            yield cast(part, kind).data


def _header(source: Checkpoint, weights: str, tensors: list[_Tensor]) -> bytes:
    config = source.config
    if len(config.windows) > 1:
        raise ConfigError(f"{source.folder}: windows differ between layers, which GGUF has no words for")
    if is_classifier(source.folder):
        raise UsageError(
            f"{source.folder}: a classifier, and GGUF has no words for its classes: convert it to native or hf, or "
            f"move {LABELS} away to have the model without them"
        )
    if config.windows[0]:
        warnings.warn(
            f"llama.cpp has no window in this architecture: beyond {config.windows[0]:,} tokens its text will differ",
            stacklevel=4,
        )
    values: dict[str, Any] = {
        "general.architecture": gguf.ARCHITECTURE,
        "general.name": source.folder.resolve().stem,
        "general.file_type": _FILE_TYPES[weights],
        "general.quantization_version": 2,
    }
    values |= {f"{gguf.ARCHITECTURE}.{key}": value for key, value in gguf.config_values(config).items()}
    values |= to_header(_vocabulary(source))
    content = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(values))]
    content += [_string(key.encode()) + _value(value) for key, value in values.items()]
    numbers, offset = {kind: number for number, kind in TYPES.items()}, 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        content += [
            _string(tensor.name.encode()),
            struct.pack(f"<I{len(dims)}QI", len(dims), *dims, numbers[tensor.kind]),
        ]
        content.append(struct.pack("<Q", offset))
        offset += -(-tensor.size // _ALIGNMENT) * _ALIGNMENT
    header = b"".join(content)
    return header + bytes(-len(header) % _ALIGNMENT)


def _vocabulary(source: Checkpoint) -> SentencePieces:
    """The model's SentencePiece pieces; CheckpointError where it has none or another tokenizer."""
    path = load_tokenizer(source.folder, source.config.vocab_size).path
    if path.suffix == GGUF:
        return from_gguf(path)
    if path.suffix == ".json":
        raise CheckpointError(f"{path}: only a SentencePiece tokenizer (tokenizer.model) can be written to a GGUF file")
    return from_file(path.read_bytes(), path)


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(value: Any) -> bytes:
    """A header value: bool, whole number (32 bits), float, text, list of texts, array of float32 or int32."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value.encode())
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    kind = _FLOAT32 if value.dtype.kind == "f" else _INT32
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.tobytes()
