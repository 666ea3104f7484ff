"""The native backend's part of every step, where a model's layers lie on many ranks. Between them goes the residual
stream, in fp32, so that stages give the bits of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout
from maestrale.checkpoint.reader import Checkpoint
from maestrale.mesh import Shard
from maestrale.native_backend.load import load_model
from maestrale.native_backend.runner import compute, memory_errors


class NativeStage:
    """One rank's layers and its cache of them. model: the extension's."""

    def __init__(self, model: Any, shard: Shard):
        self.model, self.config, self.last = model, shard.local_config, shard.last

    def hidden_rows(self, count: int) -> torch.Tensor:
        return torch.empty(count, self.config.dim)

    def compute(self, batch: Batch, hidden_TD: torch.Tensor | None) -> tuple[torch.Tensor, NDArray[np.int16] | None]:
        before = None if hidden_TD is None else hidden_TD.numpy()
        out, experts = compute(self.model, self.config, batch, before, self.last)
        return torch.from_numpy(out), experts


def open_stage(
    checkpoint: Checkpoint,
    shard: Shard,
    layout: CacheLayout,
    cache: str,
    weights: str,
    threads: int,
    progress: Callable[[int, int], None],
) -> NativeStage:
    """This rank's layers of the checkpoint, as `open_runner` makes a whole model."""
    with memory_errors():
        model, _ = load_model(
            checkpoint,
            layout,
            weights,
            cache=cache,
            threads=threads,
            layers=shard.layers,
            progress=progress,
        )
    return NativeStage(model, shard)
