"""LoRA adapters on disk, in both layouts that people use; in memory one form, with canonical names and native rows.

- PEFT: adapter_config.json and adapter_model.safetensors; names and row order of Hugging Face's model files.
- Native: lora.safetensors (`<linear>.lora_A.weight`, `<linear>.lora_B.weight`) and params.json with
  `"lora": {"rank": …, "scaling": …}`; a file without params.json beside it has the reference's scaling of 2.

Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.dtypes import WEIGHT_DTYPES, StoredTensor, cast, is_finite
from maestrale.checkpoint.hf import has_permuted_rows, hf_name, to_hf_rows, to_native_rows
from maestrale.checkpoint.jsonfile import read_json
from maestrale.checkpoint.safetensors_room import open_safetensors
from maestrale.checkpoint.writer import atomic_folder, write_json, write_safetensors
from maestrale.config import ModelConfig
from maestrale.errors import CheckpointError, UsageError
from maestrale.plan import tensor_plan

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NATIVE_CONFIG, NATIVE_WEIGHTS = "params.json", "lora.safetensors"
LAYOUTS = ("peft", "native")
_PEFT_PREFIX = "base_model.model."
_EMBEDDING = "tok_embeddings.weight"
_DEFAULT_SCALING = 2.0  # of the reference, whose loader takes a bare file
# Settings of PEFT that change the numbers in ways unknown here → the value that does not.
_PEFT_PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
}
# Weights of the base model that PEFT writes beside an adapter that touches the head, as they were.
_BASE_COPIES = {_PEFT_PREFIX + n for n in ("lm_head.base_layer.weight", "lm_head.weight", "model.embed_tokens.weight")}
_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*){1,200}\$?")
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base model's weights as well


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
        settings: _PeftSettings | _NativeSettings = _PeftSettings(path / PEFT_CONFIG)
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
                tensors[f"{_PEFT_PREFIX}{_hf_module(name)}.{part}"] = array
        write_json(folder / PEFT_CONFIG, _peft_settings(adapter, rank, scale))
    entries = [(name, "F32", array.shape) for name, array in tensors.items()]
    stored = (StoredTensor.from_array(array, "F32") for array in tensors.values())
    write_safetensors(folder / (NATIVE_WEIGHTS if layout == "native" else PEFT_WEIGHTS), entries, stored)


def _peft_settings(adapter: Adapter, rank: int, scale: float) -> dict[str, Any]:
    alpha = scale * rank
    ranks = {_hf_module(name): d.rank for name, d in adapter.deltas.items() if d.rank != rank}
    alphas = {_hf_module(name): d.scale * d.rank for name, d in adapter.deltas.items() if d.scale * d.rank != alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({_hf_module(name).rpartition(".")[2] for name in adapter.deltas}),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_dora": any(delta.magnitude is not None for delta in adapter.deltas.values()),
        "use_rslora": False,
    }


class _PeftSettings:
    """adapter_config.json, checked: how modules are named, and each one's rank and scale."""

    permuted = True

    def __init__(self, source: Path):
        self.settings, self.source = read_json(source), source
        if (kind := self.settings.get("peft_type")) != "LORA":
            raise CheckpointError(f"{source}: peft_type = {kind!r}: expected LORA")
        for key, plain in _PEFT_PLAIN.items():
            if (value := self.settings.get(key, plain)) not in (plain, None, [], {}):
                raise CheckpointError(f"{source}: {key} = {value!r:.60}: expected {plain!r}, nothing else is supported")
        if (start := self.settings.get("init_lora_weights", True)) not in _PLAIN_STARTS:
            raise CheckpointError(
                f"{source}: init_lora_weights = {start!r:.60} changes the base model's weights: "
                "convert the adapter to a plain one with peft first"
            )
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = self.settings.get(key) or {}
            if not isinstance(patterns, dict) or not all(map(_is_harmless, patterns)):
                raise CheckpointError(
                    f"{source}: {key} = {patterns!r:.60}: expected modules (. and .* allowed) and numbers"
                )

    def module(self, name: str) -> str:
        return _PEFT_PREFIX + _hf_module(name)

    def rank(self, name: str) -> int:
        rank = self._value("r", "rank_pattern", name)
        if type(rank) is not int or not 1 <= rank < 1 << 20:
            raise CheckpointError(f"{self.source}: r = {rank!r:.60}: expected a whole number of at least 1")
        return rank

    def scale(self, name: str) -> float:
        alpha, rank = self._value("lora_alpha", "alpha_pattern", name), self.rank(name)
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise CheckpointError(f"{self.source}: lora_alpha = {alpha!r:.60}: expected a finite number above 0")
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _value(self, key: str, patterns: str, name: str) -> Any:
        """That of the first pattern that a module's name ends with, else the general one."""
        for pattern, special in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", _hf_module(name)):
                return special
        return self.settings.get(key)


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
        if type(rank) is not int or rank < 0 or type(scaling) not in (int, float) or not 0 < scaling < math.inf:
            raise CheckpointError(f"{source}: lora = {settings!r:.80}: expected a rank and a scaling above 0")
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
        if stored in _BASE_COPIES:
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


def _is_harmless(pattern: str) -> bool:
    """Whether a pattern is one of those that PEFT's configurations hold: nothing that could run for long."""
    return bool(_PATTERN.fullmatch(pattern)) and pattern.count("*") <= 4


def _hf_module(name: str) -> str:
    return _stem(hf_name(f"{name}.weight"))


def _stem(name: str) -> str:
    return name.removesuffix(".weight")
