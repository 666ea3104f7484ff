"""A model over many ranks, as the engine sees it: rank 0 has the runner, the others do what it sends them.

A batch goes to every rank as one flat array. Each stage computes its layers and sends hidden rows on; the last one
sends logits back. `send` and `receive` are apart, so that as many batches as stages may be under way at once.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout, StepOutput
from maestrale.errors import DistributedError, MaestraleError, MemoryLimitError
from maestrale.memory import available_memory, cache_budget
from maestrale.mesh import Shard
from maestrale.parallel.link import Link
from maestrale.parallel.wire import pack_batch, unpack_batch
from maestrale.plan import cache_bytes

_LEAVE, _REPORT, _ALIVE = 0, -1, -2  # in place of a batch's length


class Stage(Protocol):
    """What a backend does on one rank."""

    def hidden_rows(self, count: int) -> torch.Tensor:
        """Room for hidden rows [count, dim] of the stage before."""

    def compute(self, batch: Batch, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        """Hidden rows [T, dim] for the next stage, or of the last one fp32 logits [N, this shard's part of the
        vocabulary]. hidden_TD: what came of the stage before; None on the first."""


@dataclass(frozen=True)
class Usage:
    """What a rank has done. busy: seconds of computing, so far. peak: the most bytes of main memory it has held.
    weights: those of its part of the model."""

    busy: float
    peak: int
    weights: int


class Worker:
    """This rank's part of every step: what comes in, goes through its stage and goes on."""

    def __init__(self, stage: Stage, shard: Shard, link: Link, weight_bytes: int):
        self.stage, self.shard, self.link, self.weight_bytes = stage, shard, link, weight_bytes
        self.busy = 0.0

    def run(self, batch: Batch) -> torch.Tensor | None:
        """fp32 logits [N, vocab] on rank 0 if it is of the last stage; else they are on their way to it, and None."""
        shard, link = self.shard, self.link
        hidden_TD = None
        if not shard.first:
            hidden_TD = link.receive(self.stage.hidden_rows(len(batch.token_ids)), link.rank - shard.mesh.tensor)
        begun, waited = time.perf_counter(), link.waited
        out = self.stage.compute(batch, hidden_TD)
        self.busy += time.perf_counter() - begun - (link.waited - waited)
        if not shard.last:
            link.send(out, link.rank + shard.mesh.tensor)
            return None
        if not len(out):
            return out  # nobody waits for it: rank 0 knows how many rows it wants
        leader = link.rank - shard.index
        if shard.index:
            link.send(out, leader)
            return None
        logits_NV = self._gather(out, leader)
        if leader == 0:
            return logits_NV
        link.send(logits_NV.cpu(), 0)
        return None

    def usage(self) -> Usage:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Usage(self.busy, peak, self.weight_bytes)

    def _gather(self, logits_NV: torch.Tensor, leader: int) -> torch.Tensor:
        """The shards' parts of the vocabulary, side by side."""
        parts = [logits_NV]
        for other in range(1, self.shard.mesh.tensor):
            begin, end = Shard(self.shard.config, self.shard.mesh, leader + other, self.shard.layers).span("vocab")
            part = torch.empty(len(logits_NV), end - begin, dtype=logits_NV.dtype, device=logits_NV.device)
            parts.append(self.link.receive(part, leader + other))
        return torch.cat(parts, dim=1)


class ParallelRunner:
    """Rank 0's runner. `depth`: how many batches may be sent before the first is received."""

    def __init__(self, worker: Worker, layout: CacheLayout):
        self._worker, self._layout, self._link = worker, layout, worker.link
        self.depth = self._link.mesh.pipeline
        self._under_way: deque[int | NDArray[np.float32]] = deque()  # wanted rows to come, or logits that are there
        self._left, self._telling = threading.Event(), threading.Lock()
        threading.Thread(target=self._say_alive, name="alive", daemon=True).start()

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def step(self, batch: Batch) -> StepOutput:
        self.send(batch)
        return self.receive()

    def send(self, batch: Batch) -> None:
        """Sets all stages to work on `batch`; returns when the first, which is this rank's, has done its part."""
        flat = torch.from_numpy(pack_batch(batch))
        self._tell(len(flat), flat)
        logits_NV = self._worker.run(batch)
        self._under_way.append(len(batch.logit_rows) if logits_NV is None else logits_NV.cpu().numpy())

    def receive(self) -> StepOutput:
        """The logits of the oldest batch under way."""
        oldest = self._under_way.popleft()
        if not isinstance(oldest, int):
            return StepOutput(oldest)
        logits_NV = torch.empty(oldest, self._worker.shard.config.vocab_size)
        if oldest:
            self._link.receive(logits_NV, self._link.size - self._link.mesh.tensor)
        return StepOutput(logits_NV.numpy())

    def usage(self) -> list[Usage]:
        """What each rank has done, when it is done with what was sent."""
        self._tell(_REPORT)
        reports = [torch.empty(3, dtype=torch.float64) for _ in range(1, self._link.size)]
        for rank, report in enumerate(reports, start=1):
            self._link.receive(report, rank, idle=True)
        return [
            self._worker.usage(),
            *(Usage(busy, int(peak), int(weights)) for busy, peak, weights in map(torch.Tensor.tolist, reports)),
        ]

    def close(self) -> None:
        """Lets the other ranks go. Where one has gone already, that has been told."""
        self._left.set()
        with suppress(DistributedError):
            self._tell(_LEAVE)
            self._link.close()

    def _tell(self, what: int, flat: torch.Tensor | None = None) -> None:
        with self._telling:
            for rank in range(1, self._link.size):
                self._link.send(torch.tensor([what]), rank, idle=True)
                if flat is not None:
                    self._link.send(flat, rank)

    def _say_alive(self) -> None:
        """So that a rank without work can tell rest from a cable that has been cut."""
        with suppress(DistributedError):  # whoever waits for an answer meets it too, and says so
            while not self._left.wait(self._link.timeout / 4):
                self._tell(_ALIVE)


def open_ranks(
    shard: Shard,
    link: Link,
    weight_bytes: int,
    layout_for: Callable[[int], CacheLayout],
    open_stage: Callable[[CacheLayout], Stage],
) -> ParallelRunner:
    """Loads every rank's share. Returns on rank 0 only; on the others it works until rank 0 lets them go, and leaves.

    weight_bytes: of this rank's share. layout_for: from the bytes that the cache of the whole model may take to the
    cache's layout. DistributedError, on every rank, where one of them cannot do its part.
    """

    def room() -> int:
        memory = available_memory() // link.ranks_on_host
        if weight_bytes > memory:
            raise MemoryLimitError(f"its share of the weights takes {weight_bytes:,} bytes, {memory:,} are to be had")
        return cache_budget(memory, weight_bytes)

    share = cache_bytes(shard.local_config, 4096, 1) / cache_bytes(shard.config, 4096, 1)
    (budget,) = link.least([int(link.agree(room) / share)])
    layout = layout_for(budget)
    worker = Worker(link.agree(lambda: open_stage(layout)), shard, link, weight_bytes)
    if link.rank == 0:
        return ParallelRunner(worker, layout)
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for rank 0, which ends its work and lets the others go
        signal.signal(number, signal.SIG_IGN)
    work(worker, layout)
    link.close()
    sys.exit(0)


def work(worker: Worker, layout: CacheLayout) -> None:
    """What rank 0 sends, until it lets this rank go."""
    link = worker.link
    while (length := int(link.receive(torch.empty(1, dtype=torch.int64), 0, idle=True))) != _LEAVE:
        if length == _ALIVE:
            continue
        if length == _REPORT:
            usage = worker.usage()
            link.send(torch.tensor([usage.busy, usage.peak, usage.weights], dtype=torch.float64), 0, idle=True)
            continue
        flat = link.receive(torch.empty(length, dtype=torch.int64), 0)
        try:
            worker.run(unpack_batch(flat.numpy(), layout))
        except MaestraleError:
            raise
        except Exception as error:
            raise DistributedError(f"rank {link.rank} on {link.host}: {type(error).__name__}: {error}") from error
