"""The torch backend's part of every step, where a model lies on many ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout
from maestrale.checkpoint.adapter import Adapter
from maestrale.checkpoint.reader import Checkpoint
from maestrale.memory import keep_freed_memory
from maestrale.mesh import Shard
from maestrale.torch_backend.adapters import Adapters
from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.load import DTYPES
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.ops import sdpa
from maestrale.torch_backend.runner import compute
from maestrale.torch_backend.shard import Sum, load_shard
from maestrale.torch_backend.staging import put


class TorchStage:
    """One rank's layers and its cache of them, on one device."""

    def __init__(self, model: Transformer, shard: Shard, layout: CacheLayout, adapters: Adapters | None):
        parameter = next(model.parameters())
        self.adapters = adapters
        self.model, self.shard, self.dtype, self.device = model, shard, parameter.dtype, parameter.device
        self.cache = PagedCache(shard.local_config, layout, self.dtype, self.device, sdpa.attend)

    def hidden_rows(self, count: int) -> torch.Tensor:
        return torch.empty(count, self.shard.config.dim, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def compute(self, batch: Batch, hidden_TD: torch.Tensor | None) -> tuple[torch.Tensor, NDArray[np.int16] | None]:
        x_T = put(batch.token_ids, self.device) if hidden_TD is None else hidden_TD
        return compute(self.model, self.cache, self.adapters, batch, x_T, self.shard.last)


def open_stage(
    checkpoint: Checkpoint,
    shard: Shard,
    layout: CacheLayout,
    dtype: str,
    device: str,
    total: Sum,
    progress: Callable[[int, int], None],
    adapters: Sequence[Adapter] = (),
) -> TorchStage:
    """This rank's part of the checkpoint on `device`, computing in `dtype`. total: the sum over a stage's shards."""
    keep_freed_memory()
    model, adapted = load_shard(checkpoint, shard, DTYPES[dtype], torch.device(device), total, progress, adapters)
    return TorchStage(model, shard, layout, adapted)
