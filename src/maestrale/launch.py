"""The only place that names a backend: from a folder to an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from maestrale.checkpoint.adapter import open_adapter
from maestrale.checkpoint.dtypes import byte_count, read_dtype
from maestrale.checkpoint.reader import Checkpoint, open_checkpoint
from maestrale.config import ModelConfig
from maestrale.engine.engine import Engine
from maestrale.engine.layout import longest_fit, make_layout, sequence_bytes
from maestrale.errors import CheckpointError, MemoryLimitError, UsageError
from maestrale.memory import available_memory, cache_budget
from maestrale.plan import tensor_plan
from maestrale.text.tokenizer import Tokenizer, load_tokenizer

BUNDLED = Path(__file__).parent / "models"


_MAX_CHUNK = {"cpu": 512, "cuda": 2048}  # tokens a step where nothing else is asked for


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
    adapters: Mapping[str, str | Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Launched:
    """A model that is ready to run. tokenizer_error: why there is none, where there is none."""

    config: ModelConfig
    engine: Engine
    tokenizer: Tokenizer | None
    tokenizer_error: CheckpointError | None


def model_folder(path: str | Path | None) -> Path:
    """The folder of a model: `path` itself; the bundled model of that name where no such path exists ("stories",
    "stories-moe"); the bundled "stories" where none is given."""
    bundled = BUNDLED / str(path or "stories")
    named = path is None or ("/" not in str(path) and not os.path.lexists(path) and bundled.is_dir())
    return bundled if named else Path(cast(str | Path, path))


def longest_context(config: ModelConfig, max_len: int, batch: int, element_bytes: int, budget: int) -> int:
    """The most tokens, up to `max_len`, of each of `batch` sequences whose cache fits `budget` bytes on the CPU."""

    def size(length: int) -> int:
        return batch * sequence_bytes(config, length, _MAX_CHUNK["cpu"], element_bytes)

    return longest_fit(size, max_len, budget)


def launch(
    path: str | Path | None,
    options: Options,
    require_tokenizer: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Launched:
    """Checks all that can be checked without a weight, then loads. Errors: UsageError, ConfigError, CheckpointError,
    MemoryLimitError. `progress` gets (tensors loaded, tensors in all)."""
    _check(options)
    with open_checkpoint(model_folder(path), options.ignore_unexpected) as checkpoint:
        config = checkpoint.config
        tokenizer, problem = _tokenizer(checkpoint.folder, config.vocab_size, require_tokenizer)
        device = _device(options.device)
        adapters = [open_adapter(place, config) for place in options.adapters.values()]
        wanted = "bfloat16" if options.weights == "bf16" else options.dtype
        dtype = read_dtype(wanted, checkpoint.dtype)
        max_chunk = _MAX_CHUNK[device.split(":")[0]] if options.max_batch_tokens is None else options.max_batch_tokens
        memory, weight_bytes = _memory(device), _weight_bytes(checkpoint, dtype)
        if weight_bytes > memory:
            raise MemoryLimitError(
                f"{checkpoint.folder}: the weights take {weight_bytes / 2**30:.1f} GiB as {dtype}, "
                f"{memory / 2**30:.1f} GiB are to be had on {device}"
            )
        layout = make_layout(
            config,
            max_len=options.max_len,
            max_chunk=max_chunk,
            max_sequences=options.max_sequences,
            element_bytes=byte_count(dtype, (1,)),
            budget=cache_budget(memory, weight_bytes),
        )
        from maestrale.torch_backend.runner import open_runner

        runner = open_runner(checkpoint, layout, dtype, device, progress, adapters)
    engine = Engine(runner, config.vocab_size, tokenizer, options.max_sequences, list(options.adapters))
    return Launched(config, engine, tokenizer, problem)


def _check(options: Options) -> None:
    read_dtype(options.dtype, "")  # a word that it cannot read is refused before anything is opened
    if options.weights not in ("auto", "bf16"):
        raise UsageError(f"weights {options.weights!r}: expected auto or bf16")
    if options.weights == "bf16" and options.dtype not in ("auto", "bfloat16", "bf16"):
        raise UsageError(f"weights bf16 and dtype {options.dtype} contradict each other: give one of them")
    if options.backend not in ("auto", "torch"):
        raise UsageError(f"backend {options.backend!r}: expected auto or torch")
    if find_spec("torch") is None:
        raise UsageError("no backend is installed: run  pip install 'maestrale[torch]'")


def _tokenizer(folder: Path, vocab_size: int, required: bool) -> tuple[Tokenizer | None, CheckpointError | None]:
    try:
        return load_tokenizer(folder, vocab_size), None
    except CheckpointError as error:
        if required:
            raise
        return None, error


def _device(device: str) -> str:
    """The name of a device that works; UsageError where it does not."""
    if device != "auto" and device.split(":")[0] not in _MAX_CHUNK:
        raise UsageError(f"device {device!r}: expected auto, cpu, cuda, cuda:1 …")
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _memory(device: str) -> int:
    if device == "cpu":
        return available_memory()
    import torch

    return torch.cuda.mem_get_info(torch.device(device))[0] if device.startswith("cuda") else available_memory()


def _weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    return sum(byte_count(dtype, tensor.shape) for tensor in tensor_plan(checkpoint.config).values())
