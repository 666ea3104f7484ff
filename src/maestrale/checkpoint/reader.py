"""Opening a model's folder: which layout it is, and every check that needs no weight.

What comes out is canonical: the names and row order of plan.py, whatever the folder's own.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from numpy.typing import NDArray

from maestrale.checkpoint import packed_room
from maestrale.checkpoint.dtypes import WEIGHT_DTYPES, StoredTensor, byte_count, is_finite
from maestrale.checkpoint.folder import ROOMS, find_weights
from maestrale.checkpoint.jsonfile import read_json
from maestrale.checkpoint.packed import PackedWeight, dequantize
from maestrale.checkpoint.place import Part, Place, QuantizedPlace
from maestrale.checkpoint.safetensors_room import open_safetensors
from maestrale.checkpoint.tensorfile import TensorFile
from maestrale.config import ModelConfig
from maestrale.errors import CheckpointError
from maestrale.plan import explain_axis, tensor_plan

Places = Mapping[str, Place | QuantizedPlace]


class Checkpoint:
    """An open model folder. Tensors are given by canonical name, in native row order.

    folder: its path, or the GGUF file's. config: what it states. layout: a key of `ROOMS`, or "gguf". dtype: the one
    most weights have, to compute in; BF16 where weights are stored quantized.
    """

    def __init__(self, folder: Path, config: ModelConfig, layout: str, files: list[TensorFile], places: Places):
        self.folder, self.config, self.layout = folder, config, layout
        self._files, self._places = files, places
        self._owner = {name: file for file in files for name in file.entries}
        sizes: Counter[str] = Counter()
        for place in places.values():
            if isinstance(place, Place):
                sizes[self._owner[place.name].entries[place.name].dtype] += math.prod(place.shape)
        self.quantized = any(isinstance(place, QuantizedPlace) for place in places.values())
        self.dtype = "BF16" if self.quantized else sizes.most_common(1)[0][0]

    def names(self) -> list[str]:
        """Canonical names, in the order of the plan."""
        return list(self._places)

    def stored_dtype(self, name: str) -> str:
        """The dtype that `tensor(name)` will have, without reading it."""
        place = self._places[name]
        return "F32" if isinstance(place, QuantizedPlace) else self._owner[place.name].entries[place.name].dtype

    def storage(self, name: str) -> tuple[str, float]:
        """What `name` is stored as, "BF16" or "int4" or "Q6_K", and the bits of a weight, scales included."""
        place = self._places[name]
        if isinstance(place, QuantizedPlace):
            return place.kind, place.bits
        return self.stored_dtype(name), 8 * byte_count(self.stored_dtype(name), (1,))

    def stored_bits(self) -> Counter[str]:
        """Bits of storage by what they store: kinds as `storage` has them."""
        bits: Counter[str] = Counter()
        for name, plan in tensor_plan(self.config).items():
            kind, width = self.storage(name)
            bits[kind] += round(width * plan.size)
        return bits

    def is_packed(self, name: str) -> bool:
        """Whether `packed(name)` is to give a weight, without reading it."""
        return self.packed_format(name) is not None

    def packed_format(self, name: str) -> str | None:
        """The format of that weight, "int8" or "int4"; None where there is to be none."""
        place = self._places[name]
        return place.packed if isinstance(place, QuantizedPlace) else None

    def packed(self, name: str) -> PackedWeight | None:
        """A weight that is stored quantized in a way that packing keeps exactly; None for any other, and for one whose
        stored numbers turn out not to fit.

        Of a packed folder its arrays are views of the file; then `release` must wait until they are done with.
        """
        place = self._places[name]
        if not isinstance(place, QuantizedPlace) or not self.is_packed(name):
            return None
        weight = place.read(self._arrays(place))
        return weight if isinstance(weight, PackedWeight) else None

    def tensor(self, name: str) -> StoredTensor:
        """A view of the file where its bytes are right as they lie, else a copy of this tensor alone.

        A weight that is stored quantized is given as the values that it stands for, in F32.
        CheckpointError if the file changed since it was opened.
        """
        place = self._places[name]
        if isinstance(place, QuantizedPlace):
            weight = place.read(self._arrays(place))
            values = dequantize(weight) if isinstance(weight, PackedWeight) else weight
            return StoredTensor.from_array(values, "F32")
        tensor = self._owner[place.name].tensor(place.name)
        if place.select is None:
            return tensor
        return StoredTensor.from_array(place.select(tensor.array), tensor.dtype)

    def release(self, name: str) -> None:
        """Gives back the memory of a tensor that was copied or is done with; what was written into it is lost."""
        for stored in _stored_names(self._places[name]):
            self._owner[stored].release(stored)

    def verify_unchanged(self) -> None:
        """CheckpointError if any of the files changed since it was opened."""
        for file in self._files:
            file.mapped.verify_unchanged()

    def _arrays(self, place: QuantizedPlace) -> list[NDArray]:
        return [self._owner[part.name].tensor(part.name).array for part in place.parts]

    def close(self) -> None:
        """Lets go of the files. Tensors given before stay valid: they keep the mapping they look into."""
        self._files, self._owner = [], {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(folder: str | Path, ignore_unexpected: bool = False) -> Checkpoint:
    """Reads configuration and headers, checks them against each other, and maps the weights; reads none of them.

    Every fault is a CheckpointError, or a ConfigError for impossible values in params.json or config.json.
    """
    folder = Path(folder)
    layout, paths = find_weights(folder)
    if layout == "gguf":
        return _open_gguf(folder, next(iter(paths)), ignore_unexpected)
    room = ROOMS[layout]
    source = folder / room.CONFIG
    from_values = ModelConfig.from_hf if layout == "hf" else ModelConfig.from_mistral
    values, quantization = read_json(source), None
    if layout == "hf":
        quantization = values.pop("quantization_config", None)
    config = from_values(values, str(source))
    files = [open_safetensors(path) if path.suffix == ".safetensors" else _open_pth(path) for path in paths]
    owner = _owners(files)
    for path, names in paths.items():
        if absent := [name for name in names if name not in owner or owner[name].path != path]:
            raise CheckpointError(f"{path}: the index says that it holds {_listed(absent)}; it does not")
    places: Places
    if layout == "packed":
        places = packed_room.places(config, files[0])
    elif quantization is not None:
        from maestrale.checkpoint import hf_quantized

        places = hf_quantized.places(config, owner, hf_quantized.read_scheme(quantization, str(source)))
    else:
        places = room.places(config, owner)
    _check(places, owner, config, source, room.IGNORED, ignore_unexpected)
    return Checkpoint(folder, config, layout, files, places)


def _open_pth(path: Path) -> TensorFile:
    from maestrale.checkpoint.pth_room import open_pth  # here, as below, so that other folders open sooner

    return open_pth(path)


def _open_gguf(folder: Path, path: Path, ignore_unexpected: bool) -> Checkpoint:
    from maestrale.checkpoint import gguf
    from maestrale.checkpoint.gguf_room import open_gguf

    file = open_gguf(path)
    config = gguf.read_config(file)
    places = gguf.places(config, file)
    _check(places, dict.fromkeys(file.entries, file), config, path, gguf.IGNORED, ignore_unexpected)
    return Checkpoint(folder, config, "gguf", [file], places)


def check_finite(checkpoint: Checkpoint) -> list[str]:
    """The names of the tensors that hold NaN or Inf; reads all weights, one after the other."""
    bad = []
    for name in checkpoint.names():
        if not is_finite(checkpoint.tensor(name)):
            bad.append(name)
        checkpoint.release(name)
    return bad


def _owners(files: list[TensorFile]) -> dict[str, TensorFile]:
    owner: dict[str, TensorFile] = {}
    for file in files:
        for name in file.entries:
            if name in owner:
                raise CheckpointError(f"tensor {name!r} stands in both {owner[name].path} and {file.path}")
            owner[name] = file
    return owner


def _check(
    places: Places,
    owner: Mapping[str, TensorFile],
    config: ModelConfig,
    source: Path,
    ignored: re.Pattern[str],
    ignore_unexpected: bool,
) -> None:
    """Every expected tensor is there, and no other, and each is what it should be. source: what describes the model."""
    _check_names(places, owner, source, ignored, config.tied_embeddings, ignore_unexpected)
    for place in places.values():
        if isinstance(place, QuantizedPlace):
            for part in place.parts:
                _check_part(part, owner[part.name])
        else:
            _check_entry(place, owner[place.name], config, source.name)


def _check_names(
    places: Places,
    owner: Mapping[str, TensorFile],
    source: Path,
    ignored: re.Pattern[str],
    tied: bool,
    ignore_unexpected: bool,
) -> None:
    expected = dict.fromkeys(name for place in places.values() for name in _stored_names(place))
    missing = [name for name in expected if name not in owner]
    unexpected = [name for name in owner if name not in expected and not ignored.fullmatch(name)]
    head = [name for name in unexpected if tied and name in ("output.weight", "lm_head.weight")]
    unexpected = [name for name in unexpected if name not in head]
    if missing:
        also = f"; unexpected tensors: {_listed(unexpected)}" if unexpected else ""
        raise CheckpointError(
            f"{source.parent}: {len(missing)} of the {len(expected)} tensors that {source.name} asks for are missing: "
            f"{_listed(missing)}{also}"
        )
    if head:
        warnings.warn(f"{source}: embeddings are tied: ignoring {head[0]}", stacklevel=3)
    if unexpected:
        message = f"{source.parent}: tensors that {source.name} has no place for: {_listed(unexpected)}"
        if not ignore_unexpected:
            raise CheckpointError(f"{message}; --ignore-unexpected goes on without them")
        warnings.warn(f"{message}; ignored", stacklevel=3)


def _check_entry(place: Place, file: TensorFile, config: ModelConfig, source: str) -> None:
    entry = file.entries[place.name]
    where = f"{place.name} in {file.path.name}"
    if entry.shape != place.shape:
        known = len(entry.shape) == len(place.shape)
        axes = [a for i, a in enumerate(place.axes) if not known or entry.shape[i] != place.shape[i]]
        words = ", ".join(dict.fromkeys(explain_axis(config, axis) for group in axes for axis in group))
        raise CheckpointError(f"{where}: expected {place.shape}, got {entry.shape}; {source} says {words}")
    if entry.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"{where}: dtype {entry.dtype}; expected one of {', '.join(WEIGHT_DTYPES)}")


def _check_part(part: Part, file: TensorFile) -> None:
    entry = file.entries[part.name]
    if entry.dtype not in part.dtypes or entry.shape != part.shape:
        expected = f"{' or '.join(part.dtypes)} {part.shape}"
        raise CheckpointError(f"{part.name} in {file.path.name}: expected {expected}, got {entry.dtype} {entry.shape}")


def _stored_names(place: Place | QuantizedPlace) -> list[str]:
    return [part.name for part in place.parts] if isinstance(place, QuantizedPlace) else [place.name]


def _listed(names: list[str]) -> str:
    """Known names as they are, strange ones escaped: a message stays one line."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)
