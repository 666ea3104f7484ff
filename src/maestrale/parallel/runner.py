"""A model over many ranks, as the engine sees it: rank 0 has the runner, the others do what it sends them.

A batch goes to every rank as one flat array. Each stage computes its layers and sends hidden rows on; the last one
sends logits back. As many batches as stages may be under way at once.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout, StepOutput
from maestrale.errors import DistributedError, MaestraleError, MemoryLimitError
from maestrale.memory import cache_budget, peak_memory
from maestrale.mesh import Shard
from maestrale.parallel.link import Link
from maestrale.parallel.wire import pack_batch, unpack_batch
from maestrale.plan import cache_bytes

_LEAVE, _REPORT = 0, -1  # messages of one number; a batch has more


class Stage(Protocol):
    """What a backend does on one rank."""

    def hidden_rows(self, count: int) -> torch.Tensor:
        """Room for hidden rows [count, dim] of the stage before."""

    def compute(self, batch: Batch, hidden_TD: torch.Tensor | None) -> tuple[torch.Tensor, NDArray[np.int16] | None]:
        """Hidden rows [T, dim] for the next stage, or of the last one fp32 logits [N, this shard's part of the
        vocabulary]; and the experts [N, the stage's layers, K] of the wanted rows, where they are asked for.
        hidden_TD: what came of the stage before; None on the first."""


@dataclass(frozen=True)
class Usage:
    """What a rank has done. busy: seconds of computing, so far. peak: the most bytes of main memory it has held; base:
    before it loaded anything. weights: those of its part of the model."""

    busy: float
    peak: int
    base: int
    weights: int


@dataclass
class Pending:
    """A batch's answer, as far as rank 0 has it. rows: how many are wanted. experts: of stage 0, where they are asked
    for. logits_NV: None where another rank has the last stage, until they have come."""

    rows: int
    experts: NDArray[np.int16] | None
    logits_NV: torch.Tensor | None = None


class Worker:
    """This rank's part of every step: what comes in, goes through its stage and goes on."""

    def __init__(self, stage: Stage, shard: Shard, link: Link, weight_bytes: int, base_bytes: int):
        self.stage, self.shard, self.link, self.weight_bytes = stage, shard, link, weight_bytes
        self.base_bytes = base_bytes
        self.busy = 0.0

    def run(self, batch: Batch) -> Pending:
        """What rank 0 has at once of the batch's answer, if this is rank 0; all else is on its way to it."""
        shard, link = self.shard, self.link
        hidden_TD = None
        if not shard.first:
            hidden_TD = link.receive(self.stage.hidden_rows(len(batch.token_ids)), link.rank - shard.mesh.tensor)
        begun, waited = time.perf_counter(), link.waited
        out, experts = self.stage.compute(batch, hidden_TD)
        self.busy += time.perf_counter() - begun - (link.waited - waited)
        answer = Pending(len(batch.logit_rows), experts)
        if not shard.last:
            link.send(out, link.rank + shard.mesh.tensor)
        if not answer.rows:
            return answer  # nobody waits for it: rank 0 knows how many rows it wants
        if experts is not None and link.rank and not shard.index:
            link.send(torch.from_numpy(np.ascontiguousarray(experts)), 0)
        if shard.last:
            answer.logits_NV = self._gather(out, link.rank - shard.index)
            if link.rank and not shard.index:
                link.send(answer.logits_NV, 0)
        return answer

    def usage(self) -> Usage:
        return Usage(self.busy, peak_memory(), self.base_bytes, self.weight_bytes)

    def _gather(self, logits_NV: torch.Tensor, leader: int) -> torch.Tensor:
        """On the leader all shards' parts of the vocabulary, side by side."""
        if self.shard.index:
            self.link.send(logits_NV, leader)
            return logits_NV
        parts = [logits_NV.cpu()]
        for other in range(1, self.shard.mesh.tensor):
            begin, end = replace(self.shard, rank=leader + other).span("vocab")
            part = torch.empty(len(logits_NV), end - begin, dtype=logits_NV.dtype)
            parts.append(self.link.receive(part, leader + other))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class ParallelRunner:
    """Rank 0's runner."""

    def __init__(self, worker: Worker, layout: CacheLayout):
        self._worker, self._layout, self._link = worker, layout, worker.link
        self.depth, self.draws = self._link.mesh.pipeline, False
        self._under_way: deque[Pending | StepOutput] = deque()
        self._broken, self._left = False, threading.Event()
        threading.Thread(target=self._say_alive, name="alive", daemon=True).start()

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def step(self, batch: Batch) -> StepOutput:
        return self.begin(batch)()

    def begin(self, batch: Batch) -> Callable[[], StepOutput]:
        """Sets all stages to work on `batch`; returns when the first, which is this rank's, has done its part."""
        with self._unbroken():
            self._tell(pack_batch(batch, self._layout))
            self._under_way.append(self._worker.run(batch))
        return self._receive

    def _receive(self) -> StepOutput:
        """The answer to the oldest batch under way."""
        with self._unbroken():
            return self._whole(self._under_way.popleft())

    def usage(self) -> list[Usage]:
        """What each rank has done, when it is done with what was sent."""
        reports = [torch.empty(4, dtype=torch.float64) for _ in range(1, self._link.size)]
        with self._unbroken():
            self._under_way = deque(map(self._whole, self._under_way))  # they come before the reports
            self._tell(np.array([_REPORT]))
            for rank, report in enumerate(reports, start=1):
                self._link.receive(report, rank)
        return [
            self._worker.usage(),
            *(Usage(busy, *map(int, sizes)) for busy, *sizes in map(torch.Tensor.tolist, reports)),
        ]

    def close(self) -> None:
        """Lets the other ranks go. Where one has gone already, that has been told."""
        self._left.set()
        with suppress(DistributedError):
            self._tell(np.array([_LEAVE]))
            self._link.close()

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """A step left by an error, Ctrl-C too, leaves messages on their way that nobody waits for: then it is over."""
        if self._broken:
            raise DistributedError(f"rank 0 on {self._link.host}: a step was broken off, so the ranks do not agree now")
        self._broken = True
        yield
        self._broken = False

    def _whole(self, answer: Pending | StepOutput) -> StepOutput:
        """The answer with what comes from other stages."""
        if isinstance(answer, StepOutput):
            return answer
        logits_NV, experts = answer.logits_NV, answer.experts
        if logits_NV is None:
            mesh, shard = self._link.mesh, self._worker.shard
            logits_NV = torch.empty(answer.rows, shard.config.vocab_size)
            if experts is not None and answer.rows:
                parts = [experts]
                for stage, layers in enumerate(shard.stages[1:], start=1):
                    part = torch.empty(answer.rows, len(layers), experts.shape[2], dtype=torch.int16)
                    parts.append(self._link.receive(part, stage * mesh.tensor).numpy())
                experts = np.concatenate(parts, axis=1)
            if answer.rows:
                self._link.receive(logits_NV, self._link.size - mesh.tensor)
        return StepOutput(logits_NV.numpy(), experts)

    def _tell(self, numbers: NDArray[np.int64]) -> None:
        for rank in range(1, self._link.size):
            self._link.send(torch.from_numpy(numbers), rank)

    def _say_alive(self) -> None:
        with suppress(DistributedError):  # whoever waits for an answer meets it too, and says so
            while not self._left.wait(self._link.timeout / 4):
                self._link.say_alive()


def open_ranks(
    shard: Shard,
    link: Link,
    weight_bytes: int,
    memory: int,
    layout_for: Callable[[int], CacheLayout],
    open_stage: Callable[[CacheLayout], Stage],
) -> ParallelRunner:
    """Loads every rank's share. Returns on rank 0 only; on the others it works until rank 0 lets them go, and leaves.

    weight_bytes: of this rank's share. memory: bytes that this rank may take. layout_for: from the bytes that the cache
    of the whole model may take to the cache's layout. DistributedError, on every rank, where one of them cannot do its
    part.
    """

    def room() -> int:
        if weight_bytes > memory:
            raise MemoryLimitError(f"its share of the weights takes {weight_bytes:,} bytes, {memory:,} are to be had")
        return cache_budget(memory, weight_bytes)

    share = cache_bytes(shard.local_config, 4096, 1) / cache_bytes(shard.config, 4096, 1)
    (budget,) = link.least([int(link.agree(room) / share)])
    layout = layout_for(budget)
    base_bytes = peak_memory()
    worker = Worker(link.agree(lambda: open_stage(layout)), shard, link, weight_bytes, base_bytes)
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
    while len(numbers := link.receive_numbers(0)) != 1 or numbers[0] != _LEAVE:
        if len(numbers) == 1:
            usage = worker.usage()
            link.send(torch.tensor(astuple(usage), dtype=torch.float64), 0)
            continue
        try:
            worker.run(unpack_batch(numbers, layout))
        except MaestraleError:
            raise
        except Exception as error:  # a backend's errors are its own; here is nobody but rank 0 to tell, by leaving
            raise DistributedError(f"rank {link.rank} on {link.host}: {type(error).__name__}: {error}") from error
