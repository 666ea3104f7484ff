"""One rank's part of a model: read from disk, built by the model's own code, and changed from outside where it meets
the other ranks. The model file knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import nn
from torch.nn.functional import embedding

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.reader import Checkpoint
from maestrale.mesh import Shard
from maestrale.torch_backend.load import as_torch
from maestrale.torch_backend.model import Block, FeedForward, Transformer
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
) -> Transformer:
    """The part of `checkpoint` that `shard` names. A stage that is not the first takes hidden rows for token ids; one
    that is not the last gives hidden rows for logits; logits are those of the shard's part of the vocabulary."""
    with torch.device("meta"):
        model = _skeleton(shard)
    wanted = list(shard.tensors())
    state = {}
    for done, (name, slices) in enumerate(wanted):
        tensor = checkpoint.tensor(name)
        mine = tensor.array[slices]
        state[_local_name(name, shard)] = as_torch(StoredTensor.from_array(mine, tensor.dtype)).to(device, dtype)
        checkpoint.release(name)
        progress(done + 1, len(wanted))
    checkpoint.verify_unchanged()
    table = state.pop("tok_embeddings.weight", None)
    if shard.last and shard.config.tied_embeddings and table is not None:
        state["output.weight"] = table
    if shard.first and table is not None:
        state["tok_embeddings.weight"] = table
    model.load_state_dict(state, assign=True)
    _join(model, shard, total)
    return model.requires_grad_(False).eval()


def _skeleton(shard: Shard) -> Transformer:
    model = Transformer(shard.local_config)
    first, last = shard.span("vocab")
    if shard.first:
        model.tok_embeddings = nn.Embedding(last - first, shard.config.dim)
    else:
        model.tok_embeddings = nn.Identity()  # type: ignore[assignment]  # hidden rows come in
    if shard.last:
        model.output = nn.Linear(shard.config.dim, last - first, bias=False)
    else:
        model.norm, model.output = nn.Identity(), nn.Identity()  # type: ignore[assignment]  # hidden rows go out
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
        model.tok_embeddings = VocabularyShard(  # type: ignore[assignment]
            model.tok_embeddings.weight, shard.span("vocab")[0], total
        )
    for layer in cast(Iterable[Block], model.layers):
        layer.attention = Summed(layer.attention, total)  # type: ignore[assignment]
        layer.feed_forward = Summed(layer.feed_forward, total)


def _local_name(name: str, shard: Shard) -> str:
    """A layer's number counts from the stage's first."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{int(layer) - shard.layers.start}.{rest}"
