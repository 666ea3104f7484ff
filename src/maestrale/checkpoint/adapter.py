"""LoRA adapters on disk, in both layouts that people use; in memory one form, with canonical names and native rows.

- PEFT: adapter_config.json and adapter_model.safetensors; names and row order of Hugging Face's model files.
- Native: lora.safetensors (`<linear>.lora_A.weight`, `<linear>.lora_B.weight`) and params.json with
  `"lora": {"rank": …, "scaling": …}`; a file without params.json beside it has the reference's scaling of 2.

Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint import peft_settings
from maestrale.checkpoint.dtypes import WEIGHT_DTYPES, StoredTensor, cast, is_finite
from maestrale.checkpoint.hf import has_permuted_rows, to_hf_rows, to_native_rows
from maestrale.checkpoint.jsonfile import read_json
from maestrale.checkpoint.safetensors_room import open_safetensors
from maestrale.checkpoint.writer import atomic_folder, write_json, write_safetensors
from maestrale.config import ModelConfig
from maestrale.errors import CheckpointError, UsageError, shown
from maestrale.plan import tensor_plan

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NATIVE_CONFIG, NATIVE_WEIGHTS = "params.json", "lora.safetensors"
LAYOUTS = ("peft", "native")
_EMBEDDING = "tok_embeddings.weight"
_DEFAULT_SCALING = 2.0  # of the reference, whose loader takes a bare file


@dataclass(frozen=True, eq=False)
class Delta:
    """What is added to one linear layer: W + scale * b @ a.

    a: float32 [rank, in]. b: float32 [out, rank]. magnitude: float32 [out] makes it DoRA: each row of that sum is
    brought to this length; None leaves it.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float
    magnitude: NDArray[np.float32] | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def merged(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weight float32 [out, in] of one layer that does the work of the two."""
        total = weight + np.float32(self.scale) * (self.b @ self.a)
        if self.magnitude is None:
            return total
        return total * (self.magnitude / np.linalg.norm(total, axis=1))[:, None]


@dataclass(frozen=True, eq=False)
class Adapter:
    """deltas: by canonical name of the linear layer, such as layers.0.attention.wq. source: where it was read from."""

    deltas: Mapping[str, Delta]
    source: str

    def merge(self, name: str, tensor: StoredTensor, dtype: str) -> StoredTensor:
        """The tensor `name` of the base model with this adapter's part in it, rounded once, to `dtype`."""
        delta = self.deltas.get(name.removesuffix(".weight"))
        if delta is None:
            return tensor
        return cast(StoredTensor.from_array(delta.merged(cast(tensor, "F32").array), "F32"), dtype)


def linear_layers(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Canonical name of each linear layer, without ".weight" → (out, in)."""
    plan = tensor_plan(config)
    found = {_stem(n): (t.shape[0], t.shape[1]) for n, t in plan.items() if len(t.shape) == 2 and n != _EMBEDDING}
    return found | {"output": found.get("output", (config.vocab_size, config.dim))}


def open_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in a folder of either layout, or in a native .safetensors file, for a model of `config`.

    CheckpointError, before any model is touched, for a damaged file, a target that the model has not, a rank or shape
    that does not fit, and settings of PEFT that ask for more than is understood here.
    """
    path = Path(path)
    if (path / PEFT_CONFIG).exists():
        settings: peft_settings.PeftSettings | _NativeSettings = peft_settings.PeftSettings(path / PEFT_CONFIG)
        file = path / PEFT_WEIGHTS
    else:
        file = path / NATIVE_WEIGHTS if path.is_dir() else path
        if not file.exists():
            raise CheckpointError(
                f"{path}: no adapter here; expected {PEFT_CONFIG} with {PEFT_WEIGHTS}, or {NATIVE_WEIGHTS}"
            )
        settings = _NativeSettings(file.with_name(NATIVE_CONFIG))
    shapes = linear_layers(config)
    deltas = {}
    for name, arrays in _parts(file, {settings.module(name): name for name in shapes}).items():
        out, into = shapes[name]
        a, b = arrays.get("lora_A"), arrays.get("lora_B")
        if a is None or b is None:
            raise CheckpointError(f"{file}: {name}: lora_{'B' if b is None else 'A'} is missing; copy the file again")
        expected = settings.rank(name) or len(a)
        wanted = {"lora_A": (expected, into), "lora_B": (out, expected), "magnitude": (out,)}
        for part, array in arrays.items():
            if array.shape != wanted[part]:
                raise CheckpointError(
                    f"{file}: {name}.{part}: expected {wanted[part]}, got {array.shape}: the rank is {expected} and "
                    f"the model's {name}.weight is {out} x {into}; this adapter was made for another model"
                )
        magnitude = arrays.get("magnitude")
        if settings.permuted and has_permuted_rows(f"{name}.weight"):
            b = _rows(to_native_rows, b, config.head_dim)
            magnitude = None if magnitude is None else _rows(to_native_rows, magnitude, config.head_dim)
        deltas[name] = Delta(a, b, settings.scale(name), magnitude)
    return Adapter(deltas, str(path))


def save_adapter(
    folder: str | Path, adapter: Adapter, config: ModelConfig, layout: str, card: str, force: bool = False
) -> None:
    """Writes `adapter` to `folder` in fp32, with `card` as its README.md, whole or not at all; UsageError for DoRA in
    the native layout."""
    with atomic_folder(folder, force) as partial:
        _write(partial, adapter, config, layout)
        (partial / "README.md").write_text(card, encoding="utf-8")


def _write(folder: Path, adapter: Adapter, config: ModelConfig, layout: str) -> None:
    deltas = adapter.deltas
    rank = Counter(delta.rank for delta in deltas.values()).most_common(1)[0][0]
    scale = Counter(delta.scale for delta in deltas.values()).most_common(1)[0][0]
    tensors: dict[str, NDArray[np.float32]] = {}
    if layout == "native":
        if any(delta.magnitude is not None for delta in deltas.values()):
            raise UsageError("a DoRA adapter has no native form: write it as peft, or merge it")
        for name, delta in deltas.items():
            tensors[f"{name}.lora_A.weight"] = delta.a
            tensors[f"{name}.lora_B.weight"] = delta.b * np.float32(delta.scale / scale)
        write_json(folder / NATIVE_CONFIG, config.to_mistral() | {"lora": {"rank": rank, "scaling": scale}})
    else:
        for name, delta in deltas.items():
            parts = {"lora_A.weight": delta.a, "lora_B.weight": delta.b}
            if delta.magnitude is not None:
                parts["lora_magnitude_vector"] = delta.magnitude
            for part, array in parts.items():
                if part != "lora_A.weight" and has_permuted_rows(f"{name}.weight"):
                    array = _rows(to_hf_rows, array, config.head_dim)
                tensors[f"{peft_settings.module(name)}.{part}"] = array
        layers = {name: (delta.rank, delta.scale) for name, delta in deltas.items()}
        dora = any(delta.magnitude is not None for delta in deltas.values())
        write_json(folder / PEFT_CONFIG, peft_settings.to_settings(layers, rank, scale, dora))
    entries = [(name, "F32", array.shape) for name, array in tensors.items()]
    stored = (StoredTensor.from_array(array, "F32") for array in tensors.values())
    write_safetensors(folder / (NATIVE_WEIGHTS if layout == "native" else PEFT_WEIGHTS), entries, stored)


class _NativeSettings:
    """The `lora` of a params.json: one rank and one scaling; where it says nothing, any rank and the default."""

    permuted = False

    def __init__(self, source: Path):
        settings = read_json(source).get("lora") if source.exists() else None
        if settings is None:
            warnings.warn(f"{source}: no lora settings; taking the scaling of {_DEFAULT_SCALING:g}", stacklevel=3)
            settings = {"rank": 0}
        rank, scaling = (
            (settings.get("rank"), settings.get("scaling", _DEFAULT_SCALING)) if isinstance(settings, dict) else (-1, 0)
        )
        if (
            type(rank) is not int
            or rank < 0
            or type(scaling) not in (int, float)
            or not 0 < scaling <= peft_settings.LARGEST_SCALE
        ):
            raise CheckpointError(f"{source}: lora = {shown(settings)}: expected a rank and a scaling above 0")
        self._rank, self._scaling = rank, float(scaling)

    def module(self, name: str) -> str:
        return name

    def rank(self, name: str) -> int:
        return self._rank

    def scale(self, name: str) -> float:
        return self._scaling


def _parts(file: Path, names: Mapping[str, str]) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Canonical layer → its lora_A, lora_B and magnitude as the file has them. names: module in the file → layer."""
    opened = open_safetensors(file)
    suffixes = {
        ".lora_A.weight": "lora_A",
        ".lora_B.weight": "lora_B",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
    }
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    strange = []
    for stored in opened.entries:
        suffix = next((suffix for suffix in suffixes if stored.endswith(suffix)), None)
        layer = names.get(stored.removesuffix(suffix)) if suffix else None
        if stored in peft_settings.BASE_COPIES:
            warnings.warn(f"{file}: holds {stored} too; the model's own is used", stacklevel=3)
            continue
        if suffix is None or layer is None:
            strange.append(stored if stored.isprintable() else repr(stored))
            continue
        tensor = opened.tensor(stored)
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{file}: {stored}: dtype {tensor.dtype}; expected one of {', '.join(WEIGHT_DTYPES)}")
        if not is_finite(tensor):
            raise CheckpointError(f"{file}: {stored}: holds NaN or Inf")
        array = cast(tensor, "F32").array
        found.setdefault(layer, {})[suffixes[suffix]] = array.copy()
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise CheckpointError(f"{file}: the model has no linear layer for {', '.join(strange[:5])}{more}")
    if not found:
        raise CheckpointError(f"{file}: holds no adapter")
    return found


def _rows(permute: Callable[[NDArray, int], NDArray], array: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """`permute` on an array [rows] or [rows, n]."""
    return np.ascontiguousarray(permute(array.reshape(len(array), -1), head_dim).reshape(array.shape))


def _stem(name: str) -> str:
    return name.removesuffix(".weight")
