"""A model over many ranks, as the engine sees it: rank 0 has the runner, the others do what it sends them.

A batch goes to every rank as one flat array. Each stage computes its layers and sends hidden rows on; the last one
sends logits back. `send` and `receive` are apart, so that as many batches as stages may be under way at once.
"""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout, StepOutput
from maestrale.checkpoint.reader import Checkpoint
from maestrale.errors import DistributedError, MaestraleError, MemoryLimitError
from maestrale.memory import available_memory, cache_budget
from maestrale.mesh import Shard, shards
from maestrale.plan import cache_bytes
from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.load import DTYPES
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.ops import sdpa
from maestrale.torch_backend.parallel.link import Link
from maestrale.torch_backend.parallel.shard import load_shard
from maestrale.torch_backend.parallel.wire import pack_batch, unpack_batch


class Stage:
    """This rank's part of every step."""

    def __init__(self, model: Transformer, shard: Shard, layout: CacheLayout, link: Link):
        parameter = next(model.parameters())
        self.model, self.shard, self.link = model, shard, link
        self.dtype, self.device = parameter.dtype, parameter.device
        self.cache = PagedCache(shard.local_config, layout, self.dtype, self.device, sdpa.attend)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor | None:
        """fp32 logits [N, vocab] on rank 0 if it is of the last stage; else they are on their way to it, and None."""
        shard, link = self.shard, self.link
        tokens_T, positions_T, rows_N = (
            torch.from_numpy(array).to(self.device) for array in (batch.token_ids, batch.positions, batch.logit_rows)
        )
        if shard.first:
            x_TD = tokens_T
        else:
            x_TD = torch.empty(len(tokens_T), shard.config.dim, dtype=self.dtype, device=self.device)
            link.receive(x_TD, link.rank - shard.mesh.tensor)
        attend = self.cache.begin(batch)
        if not shard.last:
            link.send(self.model.hidden_states(x_TD, positions_T, attend), link.rank + shard.mesh.tensor)
            return None
        logits_NV = self.model(x_TD, positions_T, attend, rows_N)
        if not len(logits_NV):
            return logits_NV  # nobody waits for it: rank 0 knows how many rows it wants
        leader = link.rank - shard.index
        if shard.index:
            link.send(logits_NV, leader)
            return None
        logits_NV = self._gather(logits_NV, leader)
        if leader == 0:
            return logits_NV
        link.send(logits_NV.cpu(), 0)
        return None

    def _gather(self, logits_NV: torch.Tensor, leader: int) -> torch.Tensor:
        """The shards' parts of the vocabulary, side by side."""
        parts = [logits_NV]
        for other in range(1, self.shard.mesh.tensor):
            begin, end = Shard(self.shard.config, self.shard.mesh, leader + other, self.shard.layers).span("vocab")
            part = torch.empty(len(logits_NV), end - begin, dtype=logits_NV.dtype, device=self.device)
            parts.append(self.link.receive(part, leader + other))
        return torch.cat(parts, dim=1)


class ParallelRunner:
    """Rank 0's runner. `depth`: how many batches may be sent before the first is received."""

    def __init__(self, stage: Stage, layout: CacheLayout, link: Link):
        self._stage, self._layout, self._link = stage, layout, link
        self.depth = link.mesh.pipeline
        self._under_way: deque[int | NDArray[np.float32]] = deque()  # wanted rows to come, or logits that are there

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def step(self, batch: Batch) -> StepOutput:
        self.send(batch)
        return self.receive()

    def send(self, batch: Batch) -> None:
        """Sets all stages to work on `batch`; returns when the first, which is this rank's, has done its part."""
        flat = torch.from_numpy(pack_batch(batch))
        for rank in range(1, self._link.size):
            self._link.send(torch.tensor([len(flat)]), rank, idle=True)
            self._link.send(flat, rank)
        logits_NV = self._stage.run(batch)
        self._under_way.append(len(batch.logit_rows) if logits_NV is None else logits_NV.cpu().numpy())

    def receive(self) -> StepOutput:
        """The logits of the oldest batch under way."""
        oldest = self._under_way.popleft()
        if not isinstance(oldest, int):
            return StepOutput(oldest)
        logits_NV = torch.empty(oldest, self._stage.shard.config.vocab_size)
        if oldest:
            self._link.receive(logits_NV, self._link.size - self._link.mesh.tensor)
        return StepOutput(logits_NV.numpy())

    def close(self) -> None:
        """Lets the other ranks go. Where one has gone already, that has been told."""
        with suppress(DistributedError):
            for rank in range(1, self._link.size):
                self._link.send(torch.tensor([0]), rank, idle=True)
            self._link.close()


def open_ranks(
    checkpoint: Checkpoint,
    link: Link,
    dtype: str,
    device: str,
    layout_for: Callable[[int], CacheLayout],
    progress: Callable[[int, int], None],
) -> ParallelRunner:
    """Loads every rank's share. Returns on rank 0 only; on the others it works until rank 0 lets them go, and leaves.

    layout_for: from the bytes that the cache of the whole model may take to the cache's layout. DistributedError, on
    every rank, where one of them cannot do its part.
    """
    config = checkpoint.config
    shard = shards(config, link.mesh)[link.rank]
    memory = available_memory() // link.ranks_on_host
    weights = shard.parameters * DTYPES[dtype].itemsize

    def load() -> Transformer:
        if weights > memory:
            raise MemoryLimitError(f"its share of the weights takes {weights:,} bytes, {memory:,} are to be had")
        show = progress if link.rank == 0 else lambda done, total: None
        return load_shard(checkpoint, shard, DTYPES[dtype], torch.device(device), link.sum_stage, show)

    model = link.agree(load)
    share = cache_bytes(shard.local_config, 4096, 1) / cache_bytes(config, 4096, 1)
    (budget,) = link.least([int(cache_budget(memory, weights) / share)])
    layout = layout_for(budget)
    stage = link.agree(lambda: Stage(model, shard, layout, link))
    if link.rank == 0:
        return ParallelRunner(stage, layout, link)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which lets the others go
    work(stage, layout, link)
    link.close()
    sys.exit(0)


def work(stage: Stage, layout: CacheLayout, link: Link) -> None:
    """Batches from rank 0 until it sends an empty one."""
    while length := int(link.receive(torch.empty(1, dtype=torch.int64), 0, idle=True)):
        flat = link.receive(torch.empty(length, dtype=torch.int64), 0)
        try:
            stage.run(unpack_batch(flat.numpy(), layout))
        except MaestraleError:
            raise
        except Exception as error:
            raise DistributedError(f"rank {link.rank} on {link.host}: {type(error).__name__}: {error}") from error
