"""Hugging Face folders with quantized weights: GPTQ and AWQ in int4, compressed-tensors in int4 and int8.

Their codes and scales are put into our order as they are; nothing is rounded again. With n outputs and k inputs in
groups of g, a number of 4 bits at place i of an int32 being (word >> 4 i) & 15:

  gptq   qweight [k/8, n]: places along inputs · scales [k/g, n] · qzeros [k/g, n/8]: places along outputs, one less
         than the zero (format "gptq_v2": the zero) · g_idx [k]: an input's group, where inputs were reordered
  awq    qweight [k, n/8], qzeros [k/g, n/8]: places along outputs in the order 0 2 4 6 1 3 5 7 · scales [k/g, n]
  pack-quantized   weight_packed [n, k/8] (int8: [n, k/4]), weight_scale [n, k/g], weight_zero_point [n/8, k/g]; codes
         and zeros are stored 8 (int8: 128) above their values; weight_shape [2]; weight_g_idx [k]
  int-quantized    weight int8 [n, k], weight_scale [n, 1]

w = (code - zero) * scale; where no zeros are stored, they are 8 (0 for the int8 values of int-quantized). Sources: the
packing functions of AutoGPTQ, AutoAWQ (gemm) and compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint import hf
from maestrale.checkpoint.dtypes import StoredTensor, cast
from maestrale.checkpoint.packed import GROUPS, PackedWeight, pack_int4, pack_int8
from maestrale.checkpoint.packed_room import is_linear
from maestrale.checkpoint.place import Part, Place, QuantizedPlace
from maestrale.checkpoint.tensorfile import TensorFile
from maestrale.config import ModelConfig
from maestrale.errors import CheckpointError, ConfigError
from maestrale.plan import tensor_plan

_SCALES = ("F16", "BF16", "F32")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Scheme:
    """form: "gptq", "gptq_v2", "awq", "pack-quantized" or "int-quantized". group: inputs that share a scale, 0 for
    all of a row. zeros: whether zeros are stored. reordered: whether groups are of inputs that are not neighbours."""

    form: str
    bits: int
    group: int
    zeros: bool
    reordered: bool = False


def read_scheme(value: Any, source: str) -> Scheme:
    """What config.json's quantization_config says; ConfigError, with key and value, where it is nothing read here."""
    where = f"{source}: quantization_config"
    if not isinstance(value, dict):
        raise ConfigError(f"{where} = {str(value)[:40]}: expected an object")
    method = value.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(value, where)
    if method not in ("gptq", "awq"):
        raise ConfigError(f"{where}.quant_method = {str(method)[:40]!r}; expected gptq, awq or compressed-tensors")
    bits, group = value.get("bits", value.get("w_bit")), value.get("group_size", value.get("q_group_size", -1))
    form = value.get("checkpoint_format", "gptq") if method == "gptq" else value.get("version", "gemm")
    if form not in (("gptq", "gptq_v2") if method == "gptq" else ("gemm", "GEMM")):
        raise ConfigError(f"{where}: the layout {str(form)[:40]!r} of {method} is not supported; expected gptq or gemm")
    if bits != 4:
        raise ConfigError(f"{where}.bits = {str(bits)[:40]}; expected 4")
    reordered = method == "gptq" and bool(value.get("desc_act", False))
    return Scheme(form if method == "gptq" else "awq", 4, _group(group, where), True, reordered)


def _compressed(value: dict[str, Any], where: str) -> Scheme:
    form, groups = value.get("format"), value.get("config_groups")
    if form not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise ConfigError(f"{where}.format = {str(form)[:40]!r}; expected pack-quantized or int-quantized")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ConfigError(f"{where}.config_groups: expected one group for all linear layers")
    weights = next(iter(groups.values()))
    weights = weights.get("weights") if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or weights.get("type", "int") != "int":
        raise ConfigError(f"{where}.config_groups: expected weights of the type int")
    bits, strategy, symmetric = weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric", True)
    packed = form == "pack-quantized"
    if type(bits) is not int or bits not in ((4, 8) if packed else (8,)) or strategy not in ("group", "channel"):
        raise ConfigError(f"{where}: {bits} bits by {strategy} as {form}; expected 4 or 8, by group or channel")
    if bits == 8 and (strategy != "channel" or not symmetric):
        raise ConfigError(f"{where}: 8 bits by {strategy}, symmetric = {symmetric}; expected channel and true")
    group = _group(weights.get("group_size"), where) if strategy == "group" else 0
    reordered = weights.get("actorder") in ("group", True)
    return Scheme("pack-quantized" if packed else "int-quantized", bits, group, not symmetric, reordered)


def _group(value: Any, where: str) -> int:
    if value == -1:
        return 0
    if type(value) is not int or value < 8 or value % 8:
        raise ConfigError(f"{where}.group_size = {str(value)[:40]}; expected -1 or a multiple of 8")
    return value


def places(config: ModelConfig, stored: Mapping[str, TensorFile], scheme: Scheme) -> dict[str, Place | QuantizedPlace]:
    """Canonical name → where it is; a linear layer without codes is a plain tensor, as the head often is."""
    found: dict[str, Place | QuantizedPlace] = dict(hf.places(config, stored))
    marks = {"pack-quantized": ".weight_packed", "int-quantized": ".weight_scale"}
    for name, tensor in tensor_plan(config).items():
        stem = hf.hf_name(name).removesuffix(".weight")
        if is_linear(name) and stem + marks.get(scheme.form, ".qweight") in stored:
            n, k = tensor.shape
            head_dim = config.head_dim if hf.has_permuted_rows(name) else None
            found[name] = _place(scheme, stem, n, k, head_dim, stored)
    return found


def _place(
    scheme: Scheme, stem: str, n: int, k: int, head_dim: int | None, stored: Mapping[str, TensorFile]
) -> QuantizedPlace:
    group = scheme.group or k
    if k % group or n % 8 or k % 8:
        raise CheckpointError(f"{stem}: [{n}, {k}] is not cut into groups of {group} and words of 8")
    count = k // group
    forms: dict[str, dict[str, tuple[str | None, tuple[int, ...]]]] = {
        "gptq": {"qweight": ("I32", (k // 8, n)), "scales": (None, (count, n)), "qzeros": ("I32", (count, n // 8))},
        "awq": {"qweight": ("I32", (k, n // 8)), "scales": (None, (count, n)), "qzeros": ("I32", (count, n // 8))},
        "pack-quantized": {
            "weight_packed": ("I32", (n, k * scheme.bits // 32)),
            "weight_scale": (None, (n, count)),
            **({"weight_zero_point": ("I32", (n // 8, count))} if scheme.zeros else {}),
        },
        "int-quantized": {"weight": ("I8", (n, k)), "weight_scale": (None, (n, 1))},
    }
    parts = forms[scheme.form.removesuffix("_v2")]
    for name, extents in (("g_idx", (k,)), ("weight_g_idx", (k,)), ("weight_shape", (2,))):
        if f"{stem}.{name}" in stored:
            parts[name] = ("I64" if name == "weight_shape" else "I32", extents)
    size = sum(np.prod(extents) * (4 if dtype == "I32" else 2) for dtype, extents in parts.values())
    bits = 8.0 * size / (n * k) if scheme.form != "int-quantized" else 8 + 16 / k
    found = tuple(
        Part(f"{stem}.{part}", (dtype,) if dtype else _SCALES, extents) for part, (dtype, extents) in parts.items()
    )
    kind = {8: "int8", 4: "int4"}[scheme.bits]
    packs = scheme.bits == 8 or (not scheme.reordered and any(group % size == 0 for size in GROUPS))
    read = partial(_read, scheme=scheme, stem=stem, names=tuple(parts), shape=(n, k), head_dim=head_dim)
    return QuantizedPlace(f"{kind} ({scheme.form})", (n, k), found, bits, kind if packs else None, read)


def _read(
    arrays: list[NDArray],
    scheme: Scheme,
    stem: str,
    names: tuple[str, ...],
    shape: tuple[int, int],
    head_dim: int | None,
) -> PackedWeight | NDArray[np.float32]:
    parts = dict(zip(names, arrays, strict=True))
    zeros: NDArray | None = None
    if scheme.form.startswith("gptq"):
        codes = _places(parts["qweight"], 4).swapaxes(1, 2).reshape(shape[::-1]).T
        scales = _wide(parts["scales"]).T
        zeros = _places(parts["qzeros"], 4).reshape(scales.shape[::-1]).T
        zeros = zeros if scheme.form == "gptq_v2" else (zeros + 1) & 15
    elif scheme.form == "awq":
        codes, scales = _awq(parts["qweight"]).T, _wide(parts["scales"]).T
        zeros = _awq(parts["qzeros"]).T
    elif scheme.form == "pack-quantized":
        codes, scales = _places(parts["weight_packed"], scheme.bits).reshape(shape), _wide(parts["weight_scale"])
        if scheme.zeros:
            zeros = _places(parts["weight_zero_point"], 4).swapaxes(1, 2).reshape(scales.shape)
    else:
        codes, scales = parts["weight"], _wide(parts["weight_scale"])
    if head_dim is not None:
        codes, scales = hf.to_native_rows(codes, head_dim), hf.to_native_rows(scales, head_dim)
        zeros = None if zeros is None else hf.to_native_rows(zeros, head_dim)
    if scheme.bits == 8:
        values = codes if scheme.form == "int-quantized" else (codes ^ 128).view(np.int8)
        return pack_int8(values, scales[:, 0])
    groups = parts.get("g_idx", parts.get("weight_g_idx"))
    if groups is not None and (groups.min() < 0 or groups.max() >= scales.shape[1]):
        raise CheckpointError(
            f"{stem}: g_idx names groups {groups.min()} to {groups.max()}; expected 0 to {scales.shape[1] - 1}"
        )
    return _int4(codes, scales, zeros, groups)


def _int4(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray | None, groups: NDArray | None
) -> PackedWeight | NDArray[np.float32]:
    """codes [n, k], scales and zeros [n, k/g], groups [k] or None where inputs stand in order. Packed where that says
    the same: groups of neighbours, a multiple of a size that packing has, scales that float16 holds."""
    k, count = codes.shape[1], scales.shape[1]
    group = k // count
    zeros = np.full(scales.shape, 8, np.uint8) if zeros is None else zeros
    in_order = groups is None or np.array_equal(groups, np.arange(k) // group)
    size = next((size for size in reversed(GROUPS) if group % size == 0), None)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not in_order or size is None or not np.array_equal(halves, scales):
        index = np.arange(k) // group if groups is None else groups
        return (codes.astype(np.float32) - zeros[:, index]) * scales[:, index]
    halves, zeros = halves.repeat(group // size, axis=1), zeros.repeat(group // size, axis=1)
    if (zeros == 8).all():
        return pack_int4(codes, halves)
    return pack_int4(codes, halves, -zeros.astype(np.float32) * halves.astype(np.float32))


def _places(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """int32 [a, b] → [a, b, 32 / bits], the lowest place first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)


def _awq(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """int32 [a, n/8] → [a, n]."""
    places = _places(words, 4)
    ordered = np.empty_like(places)
    ordered[..., _AWQ_ORDER] = places
    return ordered.reshape(len(words), -1)


def _wide(scales: NDArray) -> NDArray[np.float32]:
    """Scales of F16, BF16 (patterns) or F32 → float32."""
    if scales.dtype == np.uint16:
        return cast(StoredTensor.from_array(scales, "BF16"), "F32").array
    return scales.astype(np.float32)
