"""How a model is to run, as asked, and what follows: the backend, the device, the formats, and what they take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from maestrale.checkpoint.dtypes import byte_count, read_dtype
from maestrale.checkpoint.packed_room import is_linear
from maestrale.checkpoint.reader import Checkpoint
from maestrale.config import ModelConfig
from maestrale.engine.layout import longest_fit, sequence_bytes
from maestrale.errors import UsageError, first_line, shown
from maestrale.memory import available_memory
from maestrale.plan import tensor_plan

if TYPE_CHECKING:
    from maestrale.checkpoint.quantize import Quantizer

_BACKENDS = ("auto", "native", "torch")
_WEIGHTS = ("auto", "bf16", "fp8", "int8", "int4")
_CACHES = ("auto", "int8", "fp8")
_BITS = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4.5}  # of a weight, an int4 scale for each 32 included
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either under WSL
_RANKS = ("num_pipeline_ranks", "tensor_parallel", "expert_parallel")
_MAX_RANKS = 1 << 16
_MAX_CHUNK = {"cpu": 512, "cuda": 2048}  # tokens a step where nothing else is asked for
_MAX_TIMEOUT = 86_400
_MIN_CHUNK = 128  # the same, where stages share a prompt: shorter ones read the weights too often


@dataclass(frozen=True)
class Options:
    """How to run a model; the fields of `LLM`, described there."""

    dtype: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    max_len: int | None = None
    max_batch_tokens: int | None = None
    max_sequences: int = 64
    ignore_unexpected: bool = False
    threads: int | None = None
    cache: str = "auto"
    prefix_cache: bool = True
    speculate: bool = True
    num_pipeline_ranks: int | None = None
    tensor_parallel: int | None = None
    expert_parallel: int = 1
    distributed_timeout: float = 120.0  # seconds, of a rank that should answer
    adapters: Mapping[str, str | Path] = field(default_factory=dict)


def check_options(options: Options) -> None:
    """What can be refused before anything is opened."""
    for name in ("dtype", "weights", "backend", "cache", "device"):
        if not isinstance(value := getattr(options, name), str):
            raise UsageError(f"{name} = {shown(value)}: expected a text")
    for name in ("max_len", "max_batch_tokens", "max_sequences", "threads", *_RANKS):
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise UsageError(f"{name} = {shown(value)}: expected a whole number")
    read_dtype(options.dtype, "")
    for name, value, known in (
        ("weights", options.weights, _WEIGHTS),
        ("backend", options.backend, _BACKENDS),
        ("cache", options.cache, _CACHES),
    ):
        _check_name(name, value, known)
    for name in _RANKS:
        ranks = getattr(options, name)
        if ranks is not None and not 0 < ranks <= _MAX_RANKS:
            raise UsageError(f"{name} = {ranks}: expected a whole number from 1 to {_MAX_RANKS}")
    if options.weights == "bf16" and options.dtype not in ("auto", "bfloat16", "bf16"):
        raise UsageError(f"weights bf16 and dtype {options.dtype} contradict each other: give one of them")
    if not 0 < options.distributed_timeout <= _MAX_TIMEOUT:
        raise UsageError(
            f"distributed_timeout {options.distributed_timeout:g}: expected up to {_MAX_TIMEOUT:,} seconds"
        )
    if options.device != "auto" and options.device.split(":")[0] not in _MAX_CHUNK:
        raise UsageError(f"device {options.device!r}: expected auto, cpu, cuda, cuda:1 …")


def _check_name(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{what} {value!r}: expected {', '.join(known[:-1])} or {known[-1]}")


def choose_backend(options: Options) -> tuple[str, str]:
    """The backend's name, and that of a device on which it works; UsageError, with the remedy, where there is none.

    auto is torch where it is installed and finds a GPU, else native where its kernels are built, else torch.
    """
    from maestrale.native_backend.kernels import missing

    torch, no_kernels = find_spec("torch") is not None, missing()
    on_cpu, bytes_kept = options.device in ("auto", "cpu"), options.cache == "int8"
    quantized = options.weights in ("int8", "int4") or bytes_kept
    float16 = read_dtype(options.dtype, "") == "F16"
    if options.backend == "torch" and not torch:
        raise UsageError("the torch backend is not installed: run  pip install 'maestrale[torch]'")
    fp8 = "fp8" in (options.weights, options.cache)
    if fp8 and (options.backend == "native" or quantized or not torch):
        weights, cache = (
            "weights fp8: only the torch backend's Triton kernels have them",
            "cache fp8: only the torch backend has it",
        )
        raise UsageError(f"{weights if options.weights == 'fp8' else cache}; take int8, or backend torch")
    if options.backend == "torch" and quantized:
        what = "cache int8" if bytes_kept else f"weights {options.weights}"
        raise UsageError(f"{what}: the torch backend does not quantize; take backend native")
    if options.backend == "torch" or (options.backend == "auto" and torch and not quantized):
        asked = options.backend == "torch" or float16 or fp8 or not on_cpu or no_kernels is not None
        if asked or (options.device == "auto" and _may_have_gpu()):
            device = _torch_device(options.device)
            if asked or device != "cpu":
                return "torch", device
    if no_kernels is not None:
        raise UsageError(no_kernels + ("" if torch else "; or run  pip install 'maestrale[torch]'"))
    if not on_cpu or float16:
        what = "dtype float16" if on_cpu else f"device {options.device}"
        remedy = "take backend torch" if torch else "run  pip install 'maestrale[torch]'"
        raise UsageError(f"{what}: the native backend runs on the CPU, in float32 or bfloat16; {remedy}")
    return "native", "cpu"


def choose_formats(options: Options, backend: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """What is computed in, and what the weights of linear layers are (a format of packed.py; of torch, the dtype or
    fp8)."""
    if backend == "torch":
        dtype = read_dtype("bfloat16" if options.weights == "bf16" else options.dtype, checkpoint.dtype)
        return dtype, "fp8" if options.weights == "fp8" else dtype
    stored = "F32" if checkpoint.dtype == "F32" and options.weights == "auto" else "BF16"
    dtype = read_dtype(options.dtype, stored)
    held = {format for name in checkpoint.names() if (format := checkpoint.packed_format(name))}
    if held and options.weights != "auto" and options.weights not in held:
        raise UsageError(
            f"weights {options.weights}: {checkpoint.folder} holds {', '.join(sorted(held))} already: "
            "leave weights out, or quantize the folder that it was made from"
        )
    # A folder that has those bits already is run as it is: what it left unquantized, often the head, stays so.
    return dtype, {"F32": "f32", "BF16": "bf16"}[dtype] if held or options.weights == "auto" else options.weights


def _may_have_gpu() -> bool:
    """Whether it is worth asking torch, which takes a second to import: some driver has left its mark."""
    return any(map(os.path.exists, _GPU_DRIVERS))


def _torch_device(device: str) -> str:
    """The name of a device that works; UsageError where it does not."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {first_line(error)}") from None
    return device


def memory_of(device: str) -> int:
    """Bytes to be had on a device."""
    if device == "cpu":
        return available_memory()
    import torch

    return torch.cuda.mem_get_info(torch.device(device))[0] if device.startswith("cuda") else available_memory()


def bytes_in_memory(checkpoint: Checkpoint, backend: str, dtype: str, weights: str) -> dict[str, float]:
    """What each tensor takes once it is loaded, by canonical name."""
    plan, config = tensor_plan(checkpoint.config), checkpoint.config
    if backend == "torch":
        rounded = weights == "fp8"
        return {
            name: tensor.size if rounded and is_linear(name) else byte_count(dtype, tensor.shape)
            for name, tensor in plan.items()
        }
    bits = dict.fromkeys(plan, _BITS["f32"])
    for name, tensor in plan.items():
        if name == "tok_embeddings.weight" or checkpoint.is_packed(name):
            bits[name] = checkpoint.storage(name)[1]
        elif len(tensor.shape) == 2 and not name.endswith("gate.weight"):
            bits[name] = _BITS[weights]
    sizes = {name: tensor.size * bits[name] / 8 for name, tensor in plan.items()}
    if config.tied_embeddings:  # the head is packed besides
        sizes["output.weight"] = plan["tok_embeddings.weight"].size * _BITS[weights] / 8
    return sizes


def kernels_here() -> str:
    """Which instruction set the native backend computes with on this machine, in a few words."""
    from maestrale.native_backend.kernels import describe

    return describe()


def cache_element(config: ModelConfig, dtype: str, cache: str) -> float:
    """Bytes of a number in a cache; int8: a code, and a scale in fp32 for the head_dim of a position. UsageError for a
    cache that there is not."""
    _check_name("cache", cache, _CACHES)
    return {"auto": byte_count(dtype, (1,)), "int8": 1 + 4 / config.head_dim, "fp8": 1}[cache]


def longest_context(config: ModelConfig, max_len: int, batch: int, element_bytes: float, budget: int) -> int:
    """The most tokens, up to `max_len`, of each of `batch` sequences whose cache fits `budget` bytes on the CPU."""

    def size(length: int) -> int:
        return batch * sequence_bytes(config, length, _MAX_CHUNK["cpu"], element_bytes)

    return longest_fit(size, max_len, budget)


def kept_as(options: Options, dtype: str) -> str:
    """How the native backend keeps keys and values."""
    return {"F32": "f32", "BF16": "bf16"}[dtype] if options.cache == "auto" else options.cache


def default_chunk(device: str, stages: int) -> int:
    """Tokens a step where nothing is asked for: so that a prompt of one step alone is several over several stages, and
    all of them work at it."""
    return max(_MIN_CHUNK, _MAX_CHUNK[device.split(":")[0]] // stages)


def nearest_rounding() -> Quantizer:
    """Rounding to nearest: the kernels', where they are built, else numpy's."""
    from maestrale.native_backend.kernels import missing

    if missing() is None:
        from maestrale.native_backend.rounding import round_to_nearest
    else:
        from maestrale.checkpoint.rounding import round_to_nearest
    return round_to_nearest
