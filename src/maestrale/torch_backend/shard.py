"""One rank's part of a model: read from disk, built by the model's own code, and changed from outside where it meets
the other ranks. The model file knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.nn.functional import embedding

from maestrale.checkpoint.adapter import Adapter
from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.reader import Checkpoint
from maestrale.errors import UsageError
from maestrale.mesh import Shard
from maestrale.torch_backend.adapters import Adapters
from maestrale.torch_backend.load import as_torch
from maestrale.torch_backend.model import Block, FeedForward, Transformer, empty_embedding
from maestrale.torch_backend.moe import MixtureOfExperts

Sum = Callable[[torch.Tensor], torch.Tensor]  # over the shards of a stage


class Summed(nn.Module):
    """A module whose output is one shard's share: the one all-reduce of a half block."""

    def __init__(self, inner: nn.Module, total: Sum):
        super().__init__()
        self.inner, self.total = inner, total

    def forward(self, *inputs: object) -> torch.Tensor:
        return self.total(self.inner(*inputs))


class VocabularyShard(nn.Module):
    """Rows `start` … of the embedding: a token of another shard is zeros here, and the sum is exact."""

    def __init__(self, weight: torch.Tensor, start: int, total: Sum):
        super().__init__()
        self.weight, self.start, self.total = weight, start, total

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        local_T = tokens_T - self.start
        mine_T = (local_T >= 0) & (local_T < len(self.weight))
        return self.total(embedding(local_T * mine_T, self.weight) * mine_T.unsqueeze(-1))


class Elsewhere(nn.Module):
    """An expert that another rank has: its share comes with the sum."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x_TD)


def load_shard(
    checkpoint: Checkpoint,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    total: Sum,
    progress: Callable[[int, int], None] = lambda done, total: None,
    adapters: Sequence[Adapter] = (),
) -> tuple[Transformer, Adapters | None]:
    """The part of `checkpoint` and of `adapters` that `shard` names. A stage that is not the first takes hidden rows
    for token ids; one that is not the last gives hidden rows for logits; logits are those of the shard's part of the
    vocabulary."""
    with torch.device("meta"):
        model = _skeleton(shard)
    wanted = list(shard.tensors())
    state = {}
    for done, (name, slices) in enumerate(wanted):
        tensor = checkpoint.tensor(name)
        part = StoredTensor.from_array(tensor.array[slices], tensor.dtype)
        state[_local_name(name, shard)] = as_torch(part).to(device, dtype)
        checkpoint.release(name)
        progress(done + 1, len(wanted))
    checkpoint.verify_unchanged()
    table = state.pop("tok_embeddings.weight", None)
    if shard.last and shard.config.tied_embeddings and table is not None:
        state["output.weight"] = table
    if shard.first and table is not None:
        state["tok_embeddings.weight"] = table
    model.load_state_dict(state, assign=True)
    mine = [part_of_adapter(adapter, shard) for adapter in adapters]
    adapted = Adapters(model, mine, all_rows=not shard.last) if adapters else None
    _join(model, shard, total)
    return model.requires_grad_(False).eval(), adapted


def part_of_adapter(adapter: Adapter, shard: Shard) -> Adapter:
    """What an adapter adds on this rank, by the names of its stage. A layer whose inputs are divided gives a part of a
    sum, and so does what is added to it. UsageError for DoRA there: a row's length is known to no shard alone."""
    slices, deltas = dict(shard.tensors()), {}
    head = "tok_embeddings" if shard.config.tied_embeddings and shard.last else "output"
    for name, delta in adapter.deltas.items():
        stored = f"{head if name == 'output' else name}.weight"
        if stored not in slices:
            continue
        rows, columns = slices[stored]
        if delta.magnitude is not None and columns.stop - columns.start < delta.a.shape[1]:
            raise UsageError(
                f"{adapter.source}: DoRA does not run over --tensor-parallel: merge it into its model first"
            )
        magnitude = None if delta.magnitude is None else delta.magnitude[rows]
        deltas[_local_name(name, shard)] = replace(delta, a=delta.a[:, columns], b=delta.b[rows], magnitude=magnitude)
    return replace(adapter, deltas=deltas)


def _skeleton(shard: Shard) -> Transformer:
    model = Transformer(shard.local_config)
    first, last = shard.span("vocab")
    if shard.first:
        model.tok_embeddings = empty_embedding(last - first, shard.config.dim)
    else:
        model.set_submodule("tok_embeddings", nn.Identity())  # hidden rows come in
    if shard.last:
        model.output = nn.Linear(shard.config.dim, last - first, bias=False)
    else:
        for name in ("norm", "output"):  # hidden rows go out
            model.set_submodule(name, nn.Identity())
    if shard.config.moe is not None:
        begin, end = shard.span("hidden", ".experts.")
        for layer in model.layers:
            moe = cast(MixtureOfExperts, cast(Block, layer).feed_forward)
            for e in range(len(moe.experts)):
                here = e in shard.experts
                moe.experts[e] = FeedForward(shard.config.dim, end - begin) if here else Elsewhere()
    return model


def _join(model: Transformer, shard: Shard, total: Sum) -> None:
    if shard.mesh.tensor == 1:
        return
    if shard.first:
        table = VocabularyShard(model.tok_embeddings.weight, shard.span("vocab")[0], total)
        model.set_submodule("tok_embeddings", table)
    for layer in model.layers:
        for name in ("attention", "feed_forward"):
            layer.set_submodule(name, Summed(layer.get_submodule(name), total))


def _local_name(name: str, shard: Shard) -> str:
    """A layer's number counts from the stage's first."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{int(layer) - shard.layers.start}.{rest}"
