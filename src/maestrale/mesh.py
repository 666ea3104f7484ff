"""How a model is divided over ranks: which layers, heads, experts and rows of the vocabulary each one holds.

A mesh is P pipeline stages of T shards; rank = stage * T + shard. Within a stage a shard has T-th parts of heads,
hidden channels and vocabulary; with E > 1 the experts are divided into E groups first, and each expert's hidden
channels over the T / E shards of its group. All of it is arithmetic on plan.py's axes; no backend, no process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

from maestrale.config import ModelConfig
from maestrale.errors import UsageError
from maestrale.plan import TensorPlan, tensor_plan


@dataclass(frozen=True)
class Mesh:
    """pipeline: stages P. tensor: shards T of each stage. expert: groups E of experts, a divisor of T."""

    pipeline: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def size(self) -> int:
        return self.pipeline * self.tensor

    def check(self, config: ModelConfig) -> None:
        """UsageError, with the numbers that would do, where this model cannot be divided so."""
        for option, value in (
            ("--num-pipeline-ranks", self.pipeline),
            ("--tensor-parallel", self.tensor),
            ("--expert-parallel", self.expert),
        ):
            if value < 1:
                raise UsageError(f"{option} {value}: expected at least 1")
        if self.pipeline > config.n_layers:
            raise UsageError(
                f"--num-pipeline-ranks {self.pipeline}: the model has {config.n_layers} layers, and a stage needs one"
            )
        heads, kv_heads = config.n_heads, config.n_kv_heads
        fitting = [t for t in range(1, heads + 1) if heads % t == 0 and (kv_heads % t == 0 or t % kv_heads == 0)]
        if self.tensor not in fitting:
            raise UsageError(
                f"--tensor-parallel {self.tensor}: {heads} heads and {kv_heads} key/value heads can be divided by "
                f"{', '.join(map(str, fitting))}"
            )
        if self.expert > 1 and config.moe is None:
            raise UsageError(f"--expert-parallel {self.expert}: the model has no experts")
        if config.moe is not None and (self.tensor % self.expert or self.expert > config.moe.num_experts):
            raise UsageError(
                f"--expert-parallel {self.expert}: expected a divisor of --tensor-parallel {self.tensor}, "
                f"at most the {config.moe.num_experts} experts"
            )


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a model."""

    config: ModelConfig
    mesh: Mesh
    rank: int
    layers: range  # global indices

    @property
    def stage(self) -> int:
        return self.rank // self.mesh.tensor

    @property
    def index(self) -> int:
        """Which of its stage's shards."""
        return self.rank % self.mesh.tensor

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.mesh.pipeline - 1

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank has, whole or in part."""
        groups, n = self.mesh.expert, self.config.moe.num_experts if self.config.moe else 0
        group = self.index // (self.mesh.tensor // groups)
        return range(*part(n, groups, group))

    def span(self, axis: str, name: str = "") -> tuple[int, int]:
        """[begin, end) of a logical axis of plan.py that this rank holds of the tensor `name`."""
        config, of, index = self.config, self.mesh.tensor, self.index
        if axis == "heads":
            return _scaled(part(config.n_heads, of, index), config.head_dim)
        if axis == "kv_heads":  # more ranks than heads: several hold the same one
            first = index * config.n_kv_heads // of
            return _scaled((first, first + max(1, config.n_kv_heads // of)), config.head_dim)
        if axis == "hidden":
            if ".experts." in name:
                of //= self.mesh.expert
            return part(config.hidden_dim, of, index % of)
        if axis == "vocab":
            return part(config.vocab_size, of, index)
        return 0, {"dim": config.dim, "experts": config.moe.num_experts if config.moe else 0}[axis]

    @property
    def local_config(self) -> ModelConfig:
        """The model that this rank runs: fewer layers, heads and channels. hidden_dim is a dense layer's."""
        heads, kv_heads, hidden = (self.span(axis) for axis in ("heads", "kv_heads", "hidden"))
        return replace(
            self.config,
            n_layers=len(self.layers),
            sliding_window=self.config.sliding_window[self.layers.start : self.layers.stop],
            n_heads=(heads[1] - heads[0]) // self.config.head_dim,
            n_kv_heads=(kv_heads[1] - kv_heads[0]) // self.config.head_dim,
            hidden_dim=hidden[1] - hidden[0],
        )

    def tensors(self) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """The canonical names that this rank reads, each with the part of it that is this rank's."""
        for name, planned in tensor_plan(self.config).items():
            if self._holds(name):
                yield name, self._slices(name, planned)

    def _holds(self, name: str) -> bool:
        if name == "tok_embeddings.weight":
            return self.first or (self.last and self.config.tied_embeddings)
        if not name.startswith("layers."):
            return self.last
        if int(name.split(".")[1]) not in self.layers:
            return False
        return ".experts." not in name or int(name.split(".")[4]) in self.experts

    def _slices(self, name: str, planned: TensorPlan) -> tuple[slice, ...]:
        return tuple(slice(*self.span(axis, name)) for axis in planned.axes)

    @property
    def parameters(self) -> int:
        return sum(_volume(slices) for _, slices in self.tensors())

    def bytes(self, sizes: Mapping[str, float]) -> int:
        """What this rank holds, where a whole tensor takes `sizes[name]` bytes."""
        plan = tensor_plan(self.config)
        total = sum(sizes[name] * _volume(slices) / plan[name].size for name, slices in self.tensors())
        if self.last and self.config.tied_embeddings and "output.weight" in sizes:  # packed beside the embedding
            total += sizes["output.weight"]
        return ceil(total)


def shards(config: ModelConfig, mesh: Mesh) -> list[Shard]:
    """Every rank's share, in order of rank. UsageError where the model cannot be divided so."""
    mesh.check(config)
    stages = stage_layers(config, mesh.pipeline)
    return [Shard(config, mesh, rank, stages[rank // mesh.tensor]) for rank in range(mesh.size)]


def stage_layers(config: ModelConfig, stages: int) -> list[range]:
    """Layers in stages, none empty, such that the largest stage is as small as can be; the embedding counts with the
    first and the head with the last."""
    layer = sum(t.size for name, t in tensor_plan(config).items() if name.startswith("layers.0."))
    table = config.vocab_size * config.dim

    def size(count: int, stage: int) -> int:
        return count * layer + table * ((stage == 0) + (stage == stages - 1))

    def counts(limit: int) -> list[int]:
        """The most layers that each stage takes within `limit`."""
        ends = [table * ((stage == 0) + (stage == stages - 1)) for stage in range(stages)]
        return [max(0, limit - end) // layer for end in ends]

    candidates = sorted({size(count, stage) for count in range(1, config.n_layers + 1) for stage in range(stages)})
    limit = next(c for c in candidates if min(counts(c)) >= 1 and sum(counts(c)) >= config.n_layers)
    taken, spare = counts(limit), sum(counts(limit)) - config.n_layers
    while spare:  # the stage that is the largest gives one back
        largest = max((s for s in range(stages) if taken[s] > 1), key=lambda s: size(taken[s], s))
        taken[largest] -= 1
        spare -= 1
    ends = [sum(taken[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for count, end in zip(taken, ends, strict=True)]


def part(extent: int, parts: int, index: int) -> tuple[int, int]:
    """[begin, end) of the index-th of `parts` parts that differ by at most one."""
    return extent * index // parts, extent * (index + 1) // parts


def _volume(slices: tuple[slice, ...]) -> int:
    return prod(extent.stop - extent.start for extent in slices)


def _scaled(span: tuple[int, int], factor: int) -> tuple[int, int]:
    return span[0] * factor, span[1] * factor
