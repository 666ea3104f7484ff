"""The torch backend's part of every step, where a model lies on many ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from maestrale.batch import Batch, CacheLayout
from maestrale.checkpoint.reader import Checkpoint
from maestrale.memory import keep_freed_memory
from maestrale.mesh import Shard
from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.load import DTYPES
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.ops import sdpa
from maestrale.torch_backend.shard import Sum, load_shard


class TorchStage:
    """One rank's layers and its cache of them, on one device."""

    def __init__(self, model: Transformer, shard: Shard, layout: CacheLayout):
        parameter = next(model.parameters())
        self.model, self.shard, self.dtype, self.device = model, shard, parameter.dtype, parameter.device
        self.cache = PagedCache(shard.local_config, layout, self.dtype, self.device, sdpa.attend)

    def hidden_rows(self, count: int) -> torch.Tensor:
        return torch.empty(count, self.shard.config.dim, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def compute(self, batch: Batch, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        tokens_T, positions_T, rows_N = (
            torch.from_numpy(array).to(self.device) for array in (batch.token_ids, batch.positions, batch.logit_rows)
        )
        x_TD = tokens_T if hidden_TD is None else hidden_TD
        attend = self.cache.begin(batch)
        if self.shard.last:
            return self.model(x_TD, positions_T, attend, rows_N)
        return self.model.hidden_states(x_TD, positions_T, attend)


def open_stage(
    checkpoint: Checkpoint,
    shard: Shard,
    layout: CacheLayout,
    dtype: str,
    device: str,
    total: Sum,
    progress: Callable[[int, int], None],
) -> TorchStage:
    """This rank's part of the checkpoint on `device`, computing in `dtype`. total: the sum over a stage's shards."""
    keep_freed_memory()
    model = load_shard(checkpoint, shard, DTYPES[dtype], torch.device(device), total, progress)
    return TorchStage(model, shard, layout)
