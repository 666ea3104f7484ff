"""From a folder to an engine: the only place that opens a backend."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from maestrale.batch import CacheLayout, Runner
from maestrale.checkpoint.reader import Checkpoint, open_checkpoint
from maestrale.choices import (
    Options,
    bytes_in_memory,
    cache_element,
    check_options,
    choose_backend,
    choose_formats,
    default_chunk,
    kept_as,
    memory_of,
)
from maestrale.config import ModelConfig
from maestrale.engine.engine import Engine
from maestrale.engine.layout import make_layout
from maestrale.errors import CheckpointError, MemoryLimitError, UsageError
from maestrale.memory import cache_budget
from maestrale.mesh import Mesh, shards
from maestrale.text.tokenizer import Tokenizer, load_tokenizer
from maestrale.threads import choose_threads

if TYPE_CHECKING:
    from maestrale.checkpoint.adapter import Adapter
    from maestrale.parallel.link import Link

T = TypeVar("T")
RANKS = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"}  # one of these is set in a process that torchrun or mpirun started
BUNDLED = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Launched:
    """A model that is ready to run, and on what. tokenizer_error: why there is none, where there is none.

    dtype: what it computes in, a safetensors name. tensor_bytes: what each tensor takes in memory, by canonical name.
    element_bytes: what a number takes in the cache.
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

    @property
    def description(self) -> str:
        return f"{self.backend}, {self.device}, {self.dtype}"


def model_folder(path: str | Path | None) -> Path:
    """The folder of a model: `path` itself; the bundled model of that name where no such path exists ("stories",
    "stories-moe", "stories-chat"); the bundled "stories" where none is given. CheckpointError for a word that is
    neither."""
    if path is not None and ("/" in str(path) or os.path.lexists(path)):
        return Path(path)
    bundled = sorted(folder.name for folder in BUNDLED.iterdir() if (folder / "params.json").exists())
    if (name := str(path or "stories")) not in bundled:
        raise CheckpointError(f"{name}: no such folder, and no bundled model; those are {', '.join(bundled)}")
    return BUNDLED / name


@dataclass(frozen=True)
class _Setup:
    """What is decided before a weight is read. device: this rank's; memory: bytes that this process may take of it.
    weights: the linear layers' format. The rest as `Launched` has it."""

    options: Options
    checkpoint: Checkpoint
    adapters: list[Adapter]
    backend: str
    device: str
    dtype: str
    weights: str
    max_chunk: int
    memory: int
    tensor_bytes: dict[str, float]
    element_bytes: float
    progress: Callable[[int, int], None]

    @property
    def weight_bytes(self) -> int:
        return int(sum(self.tensor_bytes.values()))

    def layout(self, budget: int) -> CacheLayout:
        """Of a cache of `budget` bytes."""
        return make_layout(
            self.checkpoint.config,
            max_len=self.options.max_len,
            max_chunk=self.max_chunk,
            max_sequences=self.options.max_sequences,
            element_bytes=self.element_bytes,
            budget=budget,
        )


def launch(
    path: str | Path | None,
    options: Options,
    require_tokenizer: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Launched:
    """Checks all that can be checked without a weight, then loads. Errors: UsageError, ConfigError, CheckpointError,
    MemoryLimitError. `progress` gets (tensors loaded, tensors in all)."""
    check_options(options)
    link = _link(options)
    if link is not None:
        _check_ranks(options)
    together = link.agree if link else _alone
    with together(lambda: open_checkpoint(model_folder(path), options.ignore_unexpected)) as checkpoint:
        config = checkpoint.config
        tokenizer, problem = _tokenizer(checkpoint.folder, config.vocab_size, require_tokenizer)
        setup = _set_up(options, checkpoint, link, progress)
        runner = _open_alone(setup) if link is None else _open_ranks(setup, link)
    engine = Engine(
        runner,
        config.vocab_size,
        tokenizer,
        options.max_sequences,
        list(options.adapters),
        prefix_cache=options.prefix_cache,
        speculate=options.speculate,
    )
    return Launched(
        config,
        engine,
        tokenizer,
        problem,
        setup.backend,
        setup.device,
        setup.dtype,
        setup.tensor_bytes,
        setup.element_bytes,
    )


def _check_ranks(options: Options) -> None:
    for what, asked in (
        ("weights fp8 do not run", options.weights == "fp8"),
        ("cache fp8 does not run", options.cache == "fp8"),
    ):
        if asked:
            raise UsageError(f"{what} over several ranks: start a single process")


def _set_up(
    options: Options, checkpoint: Checkpoint, link: Link | None, progress: Callable[[int, int], None]
) -> _Setup:
    """Backend, device, formats and memory. MemoryLimitError where the weights alone do not fit into one process."""
    config = checkpoint.config
    sharded = link is not None and link.mesh.tensor > 1
    only_torch = sharded or bool(options.adapters)
    if only_torch and options.backend == "native":
        raise UsageError("backend native: adapters and --tensor-parallel need backend torch")
    backend, device = choose_backend(replace(options, backend="torch") if only_torch else options)
    together = link.agree if link else _alone
    adapters = together(lambda: _adapters(options, checkpoint))
    dtype, weights = choose_formats(options, backend, checkpoint)
    sharing = stages = 1
    if link is not None:
        link.mesh.check(config)
        stages = link.mesh.pipeline
        if device == "cuda":
            device = f"cuda:{link.local_rank}"
        else:
            sharing = link.ranks_on_host
    setup = _Setup(
        options=options,
        checkpoint=checkpoint,
        adapters=adapters,
        backend=backend,
        device=device,
        dtype=dtype,
        weights=weights,
        max_chunk=default_chunk(device, stages) if options.max_batch_tokens is None else options.max_batch_tokens,
        memory=together(lambda: memory_of(device)) // sharing,
        tensor_bytes=bytes_in_memory(checkpoint, backend, dtype, weights),
        element_bytes=cache_element(config, dtype, options.cache),
        progress=progress,
    )
    if link is None and setup.weight_bytes > setup.memory:
        raise MemoryLimitError(
            f"{checkpoint.folder}: the weights take {setup.weight_bytes / 2**30:.1f} GiB as {weights}, "
            f"{setup.memory / 2**30:.1f} GiB are to be had on {device}"
        )
    return setup


def _adapters(options: Options, checkpoint: Checkpoint) -> list[Adapter]:
    if not options.adapters:
        return []
    from maestrale.checkpoint.adapter import open_adapter  # few ask for them

    return [open_adapter(place, checkpoint.config) for place in options.adapters.values()]


def _open_alone(setup: _Setup) -> Runner:
    options, layout = setup.options, setup.layout(cache_budget(setup.memory, setup.weight_bytes))
    if setup.backend == "native":
        from maestrale.native_backend.runner import open_runner as open_native

        kept, threads = kept_as(options, setup.dtype), choose_threads(options.threads)
        return open_native(setup.checkpoint, layout, kept, setup.weights, threads, setup.progress)
    from maestrale.torch_backend.runner import open_runner as open_torch

    return open_torch(
        setup.checkpoint,
        layout,
        setup.dtype,
        setup.device,
        setup.progress,
        setup.adapters,
        fp8=setup.weights == "fp8",
        fp8_cache=options.cache == "fp8",
    )


def _open_ranks(setup: _Setup, link: Link) -> Runner:
    """Returns on rank 0 only."""
    from maestrale.parallel.runner import Stage, open_ranks

    checkpoint, options = setup.checkpoint, setup.options
    shard = shards(checkpoint.config, link.mesh, setup.tensor_bytes, *link.least([setup.memory]))[link.rank]
    show = setup.progress if link.rank == 0 else lambda done, total: None

    def open_stage(layout: CacheLayout) -> Stage:
        if setup.backend == "native":
            from maestrale.native_backend.stage import open_stage as open_native

            kept, threads = kept_as(options, setup.dtype), choose_threads(options.threads, link.ranks_on_host)
            return open_native(checkpoint, shard, layout, kept, setup.weights, threads, show)
        from maestrale.torch_backend.stage import open_stage as open_torch

        return open_torch(checkpoint, shard, layout, setup.dtype, setup.device, link.sum_stage, show, setup.adapters)

    runner = open_ranks(shard, link, shard.bytes(setup.tensor_bytes), setup.memory, setup.layout, open_stage)
    atexit.register(runner.close)
    return runner


def _alone(work: Callable[[], T]) -> T:
    return work()


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
    from maestrale.parallel.launcher import hush_torch, world

    hush_torch()
    from maestrale.parallel.link import Link

    size = world()[1]
    tensor = options.tensor_parallel or (
        1 if options.num_pipeline_ranks is None else max(1, size // options.num_pipeline_ranks)
    )
    mesh = Mesh(options.num_pipeline_ranks or max(1, size // tensor), tensor, options.expert_parallel)
    if mesh.size != size:
        raise UsageError(
            f"{mesh.pipeline} pipeline ranks of {mesh.tensor} shards are {mesh.size} processes; {size} were started: "
            f"start with  torchrun --nproc-per-node {mesh.size}"
        )
    return Link(mesh, options.distributed_timeout) if size > 1 else None


def _tokenizer(folder: Path, vocab_size: int, required: bool) -> tuple[Tokenizer | None, CheckpointError | None]:
    try:
        return load_tokenizer(folder, vocab_size), None
    except CheckpointError as error:
        if required:
            raise
        return None, error
