"""The only place that names a backend: from a folder to an engine."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from maestrale.batch import CacheLayout, Runner
from maestrale.checkpoint.dtypes import byte_count, read_dtype
from maestrale.checkpoint.packed_room import is_linear
from maestrale.checkpoint.reader import Checkpoint, open_checkpoint
from maestrale.config import ModelConfig
from maestrale.engine.engine import Engine
from maestrale.engine.layout import longest_fit, make_layout, sequence_bytes
from maestrale.errors import CheckpointError, MemoryLimitError, UsageError
from maestrale.memory import available_memory, cache_budget
from maestrale.mesh import Mesh, shards
from maestrale.plan import tensor_plan
from maestrale.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from maestrale.checkpoint.adapter import Adapter
    from maestrale.checkpoint.classifier import Classifier
    from maestrale.checkpoint.quantize import Quantizer
    from maestrale.parallel.link import Link

T = TypeVar("T")
RANKS = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"}  # one of these is set in a process that torchrun or mpirun started
BUNDLED = Path(__file__).parent / "models"


_BACKENDS = ("auto", "native", "torch")
_WEIGHTS = ("auto", "bf16", "fp8", "int8", "int4")
_CACHES = ("auto", "int8")
_BITS = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4.5}  # of a weight, an int4 scale for each 32 included
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either under WSL
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
    output: str = "logits"  # or "hidden", what the output layer reads; or "classes", a classifier's scores


@dataclass(frozen=True)
class Launched:
    """A model that is ready to run, and on what. tokenizer_error: why there is none, where there is none.

    dtype: what it computes in, a safetensors name. tensor_bytes: what each tensor takes in memory, by canonical name.
    element_bytes: what a number takes in the cache. labels: a classifier's, where it is one that runs.
    """

    config: ModelConfig
    engine: Engine
    tokenizer: Tokenizer | None
    tokenizer_error: CheckpointError | None
    backend: str
    device: str
    dtype: str
    tensor_bytes: dict[str, float]
    element_bytes: float
    labels: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        return f"{self.backend}, {self.device}, {self.dtype}"


def model_folder(path: str | Path | None) -> Path:
    """The folder of a model: `path` itself; the bundled model of that name where no such path exists ("stories",
    "stories-moe", "stories-chat"); the bundled "stories" where none is given."""
    bundled = BUNDLED / str(path or "stories")
    named = path is None or ("/" not in str(path) and not os.path.lexists(path) and bundled.is_dir())
    return bundled if named else Path(cast(str | Path, path))


def kernels_here() -> str:
    """Which instruction set the native backend computes with on this machine, in a few words."""
    from maestrale.native_backend.kernels import describe

    return describe()


def cache_element(config: ModelConfig, dtype: str, cache: str) -> float:
    """Bytes of a number in a cache; int8: a code, and a scale in fp32 for the head_dim of a position. UsageError for a
    cache that there is not."""
    if cache not in _CACHES:
        raise UsageError(f"cache {cache!r}: expected {_CACHES[0]} or {_CACHES[1]}")
    return byte_count(dtype, (1,)) if cache == "auto" else 1 + 4 / config.head_dim


def longest_context(config: ModelConfig, max_len: int, batch: int, element_bytes: float, budget: int) -> int:
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
    link = _link(options)
    if link is not None and options.adapters:
        raise UsageError("adapters do not run over several ranks: merge the adapter into its model first")
    if link is not None and options.weights == "fp8":
        raise UsageError("weights fp8 do not run over several ranks: start a single process")
    if link is not None and options.output != "logits":
        raise UsageError("embeddings and classes are not computed over several ranks: start a single process")
    together = link.agree if link else _alone
    with together(lambda: open_checkpoint(model_folder(path), options.ignore_unexpected)) as checkpoint:
        config = checkpoint.config
        tokenizer, problem = _tokenizer(checkpoint.folder, config.vocab_size, require_tokenizer)
        sharded = link is not None and link.mesh.tensor > 1
        only_torch = sharded or bool(options.adapters) or options.output != "logits"
        if only_torch and options.backend == "native":
            raise UsageError(
                "backend native: adapters, classes, hidden states and --tensor-parallel need backend torch"
            )
        backend, device = _backend(replace(options, backend="torch") if only_torch else options)
        adapters, classifier = _additions(options, checkpoint)
        dtype, weights = _formats(options, backend, checkpoint)
        stages = 1 if link is None else link.mesh.pipeline
        max_chunk = _default_chunk(device, stages) if options.max_batch_tokens is None else options.max_batch_tokens
        tensor_bytes = _tensor_bytes(checkpoint, backend, dtype, weights)
        element_bytes = cache_element(config, dtype, options.cache)
        memory, weight_bytes = _memory(device), int(sum(tensor_bytes.values()))
        if link is not None:
            link.mesh.check(config)
        elif weight_bytes > memory:
            raise MemoryLimitError(
                f"{checkpoint.folder}: the weights take {weight_bytes / 2**30:.1f} GiB as {weights}, "
                f"{memory / 2**30:.1f} GiB are to be had on {device}"
            )

        def layout_for(budget: int) -> CacheLayout:
            return make_layout(
                config,
                max_len=options.max_len,
                max_chunk=max_chunk,
                max_sequences=options.max_sequences,
                element_bytes=element_bytes,
                budget=budget,
            )

        runner: Runner
        if link is not None:
            runner = _open_ranks(
                checkpoint, link, options, backend, device, dtype, weights, tensor_bytes, layout_for, progress
            )
        elif backend == "native":
            from maestrale.native_backend.runner import choose_threads
            from maestrale.native_backend.runner import open_runner as open_native

            layout = layout_for(cache_budget(memory, weight_bytes))
            runner = open_native(
                checkpoint, layout, _kept(options, dtype), weights, choose_threads(options.threads), progress
            )
        else:
            from maestrale.torch_backend.runner import open_runner as open_torch

            layout = layout_for(cache_budget(memory, weight_bytes))
            head = None if classifier is None else classifier.weight
            runner = open_torch(
                checkpoint,
                layout,
                dtype,
                device,
                progress,
                adapters,
                hidden=options.output == "hidden",
                head=head,
                fp8=weights == "fp8",
            )
    engine = Engine(
        runner,
        config.vocab_size,
        tokenizer,
        options.max_sequences,
        list(options.adapters),
        prefix_cache=options.prefix_cache,
        speculate=options.speculate,
    )
    labels = () if classifier is None else classifier.labels
    return Launched(config, engine, tokenizer, problem, backend, device, dtype, tensor_bytes, element_bytes, labels)


def _additions(options: Options, checkpoint: Checkpoint) -> tuple[list[Adapter], Classifier | None]:
    """What is asked for beside the model itself; imported here, since few ask."""
    adapters, classifier = [], None
    if options.adapters:
        from maestrale.checkpoint.adapter import open_adapter

        adapters = [open_adapter(place, checkpoint.config) for place in options.adapters.values()]
    if options.output == "classes":
        from maestrale.checkpoint.classifier import read_classifier

        classifier = read_classifier(checkpoint.folder, checkpoint.config)
    return adapters, classifier


def _open_ranks(
    checkpoint: Checkpoint,
    link: Link,
    options: Options,
    backend: str,
    device: str,
    dtype: str,
    weights: str,
    tensor_bytes: Mapping[str, float],
    layout_for: Callable[[int], CacheLayout],
    progress: Callable[[int, int], None],
) -> Runner:
    """Returns on rank 0 only."""
    from maestrale.parallel.runner import Stage, open_ranks

    shard = shards(checkpoint.config, link.mesh)[link.rank]
    show = progress if link.rank == 0 else lambda done, total: None

    def open_stage(layout: CacheLayout) -> Stage:
        if backend == "native":
            from maestrale.native_backend.runner import choose_threads
            from maestrale.native_backend.stage import open_stage as open_native

            threads = choose_threads(options.threads, link.ranks_on_host)
            return open_native(checkpoint, shard, layout, _kept(options, dtype), weights, threads, show)
        from maestrale.torch_backend.stage import open_stage as open_torch

        here = f"cuda:{link.local_rank}" if device == "cuda" else device
        return open_torch(checkpoint, shard, layout, dtype, here, link.sum_stage, show)

    runner = open_ranks(shard, link, shard.bytes(tensor_bytes), layout_for, open_stage)
    atexit.register(runner.close)
    return runner


def _kept(options: Options, dtype: str) -> str:
    """How the native backend keeps keys and values."""
    return {"F32": "f32", "BF16": "bf16"}[dtype] if options.cache == "auto" else options.cache


def _default_chunk(device: str, stages: int) -> int:
    """Tokens a step where nothing is asked for: so that a prompt of one step alone is several over several stages, and
    all of them work at it."""
    return max(_MIN_CHUNK, _MAX_CHUNK[device.split(":")[0]] // stages)


def _alone(work: Callable[[], T]) -> T:
    return work()


def _check(options: Options) -> None:
    """What can be refused before anything is opened."""
    read_dtype(options.dtype, "")
    for name, value, known in (("weights", options.weights, _WEIGHTS), ("backend", options.backend, _BACKENDS)):
        if value not in known:
            raise UsageError(f"{name} {value!r}: expected {', '.join(known[:-1])} or {known[-1]}")
    for name in ("num_pipeline_ranks", "tensor_parallel", "expert_parallel"):
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


def nearest_rounding() -> Quantizer:
    """Rounding to nearest: the kernels', where they are built, else numpy's."""
    from maestrale.native_backend.kernels import missing

    if missing() is None:
        from maestrale.native_backend.rounding import round_to_nearest
    else:
        from maestrale.checkpoint.rounding import round_to_nearest
    return round_to_nearest


def _backend(options: Options) -> tuple[str, str]:
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
    fp8 = options.weights == "fp8"
    if fp8 and (options.backend == "native" or bytes_kept or not torch):
        raise UsageError("weights fp8: only the torch backend has them, on a GPU; take int8, or backend torch")
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


def _formats(options: Options, backend: str, checkpoint: Checkpoint) -> tuple[str, str]:
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


def _link(options: Options) -> Link | None:
    """This process's links to the other ranks that torchrun or mpirun started; None where it is alone."""
    asked = [options.num_pipeline_ranks, options.tensor_parallel, options.expert_parallel]
    if not RANKS & set(os.environ):
        if any(value not in (None, 1) for value in asked):
            count = (options.num_pipeline_ranks or 1) * (options.tensor_parallel or 1)
            raise UsageError(
                "a model over several ranks needs as many processes: start with  "
                f"torchrun --nproc-per-node {count} -m maestrale …"
            )
        return None
    from maestrale.parallel.link import Link, world

    size = world()[1]
    tensor = options.tensor_parallel or (
        1 if options.num_pipeline_ranks is None else max(1, size // options.num_pipeline_ranks)
    )
    mesh = Mesh(options.num_pipeline_ranks or max(1, size // tensor), tensor, options.expert_parallel)
    if mesh.size != size:
        raise UsageError(
            f"{mesh.pipeline} pipeline ranks of {mesh.tensor} shards are {mesh.size} processes; {size} were started"
        )
    return Link(mesh, options.distributed_timeout) if size > 1 else None


def _tokenizer(folder: Path, vocab_size: int, required: bool) -> tuple[Tokenizer | None, CheckpointError | None]:
    try:
        return load_tokenizer(folder, vocab_size), None
    except CheckpointError as error:
        if required:
            raise
        return None, error


def _may_have_gpu() -> bool:
    """Whether it is worth asking torch, which takes a second to import: some driver has left its mark."""
    return sys.platform == "win32" or any(map(os.path.exists, _GPU_DRIVERS))


def _torch_device(device: str) -> str:
    """The name of a device that works; UsageError where it does not."""
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


def _tensor_bytes(checkpoint: Checkpoint, backend: str, dtype: str, weights: str) -> dict[str, float]:
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
