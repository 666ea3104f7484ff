"""How a model is divided over ranks: which layers, heads, experts and rows of the vocabulary each one holds.

A mesh is P pipeline stages of T shards; rank = stage * T + shard. Within a stage a shard has T-th parts of heads,
hidden channels and vocabulary; with E > 1 the experts are divided into E groups first, and each expert's hidden
channels over the T / E shards of its group. All of it is arithmetic on plan.py's axes; no backend, no process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import ceil, inf, prod

from maestrale.config import ModelConfig
from maestrale.errors import UsageError
from maestrale.plan import TensorPlan, tensor_plan

_WEIGHT_SHARE = 0.75  # of a rank's memory: where a stage would take more, the cache of all ranks would be the smaller


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
    stages: tuple[range, ...]  # global indices of each stage's layers

    @property
    def stage(self) -> int:
        return self.rank // self.mesh.tensor

    @property
    def index(self) -> int:
        """Which of its stage's shards."""
        return self.rank % self.mesh.tensor

    @property
    def layers(self) -> range:
        return self.stages[self.stage]

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
        held = {name: sizes[name] * _volume(slices) / plan[name].size for name, slices in self.tensors()}
        if self.last and self.config.tied_embeddings and "output.weight" in sizes:  # packed anew from the embedding
            held["output.weight"] = sizes["output.weight"]
            if not self.first:
                del held["tok_embeddings.weight"]
        return ceil(sum(held.values()))


def shards(config: ModelConfig, mesh: Mesh, sizes: Mapping[str, float], memory: float = inf) -> list[Shard]:
    """Every rank's share, in order of rank. sizes: bytes of each whole tensor. memory: bytes to be had on the rank that
    has the least. UsageError where the model cannot be divided so."""
    mesh.check(config)
    stages = stage_layers(config, mesh.pipeline, sizes, _WEIGHT_SHARE * memory * mesh.tensor)
    return [Shard(config, mesh, rank, stages) for rank in range(mesh.size)]


def stage_layers(config: ModelConfig, stages: int, sizes: Mapping[str, float], room: float = inf) -> tuple[range, ...]:
    """Layers in stages, none empty. A step of decoding takes as long as its slowest stage, and that one as long as it
    reads: its layers and the head, but of the embedding only rows. So of the divisions whose stages all hold at most
    `room` bytes it is one whose largest reading is the least; where there is none, one whose fullest stage holds the
    least, embedding and head counted in."""
    table = sizes["tok_embeddings.weight"]
    layer = sum(size for name, size in sizes.items() if name.startswith("layers.")) / config.n_layers
    head = [0.0] * (stages - 1) + [sizes.get("output.weight", table)]
    ends = [table + head[0], *head[1:]]
    counts = _divide(config.n_layers, layer, head, ends, room)
    if any(count * layer + end > room for count, end in zip(counts, ends, strict=True)):
        counts = _divide(config.n_layers, layer, ends, ends, inf)
    bounds = [0, *accumulate(counts)]
    return tuple(range(begin, end) for begin, end in pairwise(bounds))


def _divide(layers: int, layer: float, read: Sequence[float], held: Sequence[float], room: float) -> list[int]:
    """How many of `layers` each stage takes, so that the most that one reads is as little as can be, within `room`
    where that can be. layer: bytes of one. read, held: a stage's bytes besides."""
    counts = [1] * len(read)

    def cost(stage: int) -> tuple[bool, float, int]:
        own = (counts[stage] + 1) * layer
        return own + held[stage] > room, own + read[stage], -stage  # of equals a later one: rank 0 has the engine

    for _ in range(layers - len(counts)):
        counts[min(range(len(counts)), key=cost)] += 1
    return counts


def part(extent: int, parts: int, index: int) -> tuple[int, int]:
    """[begin, end) of the index-th of `parts` parts that differ by at most one."""
    return extent * index // parts, extent * (index + 1) // parts


def _volume(slices: tuple[slice, ...]) -> int:
    return prod(extent.stop - extent.start for extent in slices)


def _scaled(span: tuple[int, int], factor: int) -> tuple[int, int]:
    return span[0] * factor, span[1] * factor
