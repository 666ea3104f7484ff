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
from maestrale.native_backend.runner import memory_errors


class NativeStage:
    """One rank's layers and its cache of them. model: the extension's."""

    def __init__(self, model: Any, shard: Shard):
        self.model, self.shard = model, shard

    def hidden_rows(self, count: int) -> torch.Tensor:
        return torch.empty(count, self.shard.config.dim)

    def compute(self, batch: Batch, hidden_TD: torch.Tensor | None) -> tuple[torch.Tensor, NDArray[np.int16] | None]:
        config, last, experts = self.shard.config, self.shard.last, None
        with memory_errors():
            shape = (len(batch.logit_rows), config.vocab_size) if last else (len(batch.token_ids), config.dim)
            out = np.empty(shape, np.float32)
            if batch.experts and config.moe is not None:
                chosen = (len(self.shard.layers), len(batch.token_ids), config.moe.num_experts_per_tok)
                experts = np.empty(chosen, np.int16)
            self.model.step(
                *batch.arrays,
                hidden_in=None if hidden_TD is None else hidden_TD.numpy(),
                hidden_out=None if last else out,
                logits=out if last else None,
                chosen=experts,
            )
        return torch.from_numpy(out), None if experts is None else experts[:, batch.logit_rows].swapaxes(0, 1)


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
