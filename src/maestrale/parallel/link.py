"""The links between ranks: torch.distributed where all meet (gloo; on GPUs NCCL), connections.py from one to another,
and memory that the shards of one host share for their sums.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from maestrale.errors import DistributedError, first_line
from maestrale.mesh import Mesh
from maestrale.parallel.connections import Connections
from maestrale.parallel.launcher import end_with_launcher, own_address, ranks_on_this_host, set_rendezvous, world
from maestrale.parallel.shared import SharedSum, open_shared_sum

_FOREVER = timedelta(days=365)  # how long a rank waits for others to load; a dead peer is seen at once all the same
_MAX_REPORT = 2048  # bytes of a rank's report
_numbers = itertools.count()  # of links in this process, alike on all ranks


class Link:
    """One rank's ends of the links. `stage` collectives are among the shards of this rank's stage.

    waited: seconds spent in `receive` and `sum_stage`, so far.
    """

    def __init__(self, mesh: Mesh, timeout: float):
        """timeout: seconds after which a peer that should have answered counts as hanging."""
        self.mesh = mesh
        self.rank, self.size, self.local_rank = world()
        self.host, self.ranks_on_host = socket.gethostname(), ranks_on_this_host()
        self.waited, self._lost, self.timeout = 0.0, False, timeout
        end_with_launcher()
        set_rendezvous(self.size)
        if self.ranks_on_host == self.size and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody from outside has to reach us
        os.environ.setdefault("RANK", str(self.rank))
        os.environ.setdefault("WORLD_SIZE", str(self.size))
        with self._named("rendezvous"):
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
            # The store outlives a restart by torchrun, and links of before: their addresses would be found in it.
            own = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_numbers)}", store)
            backends = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"  # a tensor's device says which
            dist.init_process_group(
                backends, store=own, rank=self.rank, world_size=self.size, timeout=timedelta(seconds=timeout)
            )
            self._loading = dist.new_group(timeout=_FOREVER)
            stages = [list(range(s * mesh.tensor, (s + 1) * mesh.tensor)) for s in range(mesh.pipeline)]
            mine = self.rank // mesh.tensor
            groups = [dist.new_group(ranks, timeout=timedelta(seconds=timeout)) for ranks in stages]
            self._stage, peers = groups[mine], [rank for rank in stages[mine] if rank != self.rank]
            self._peers = f"rank {peers[0]}" if len(peers) == 1 else f"one of the ranks {', '.join(map(str, peers))}"
            self._shared = self._open_shared(timeout) if mesh.tensor > 1 else None
            self._connections = Connections(self.rank, self.size, own_address(), timeout, own.set, own.get)
        atexit.register(_leave)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Begins to send; `tensor` must not change afterwards. From any thread."""
        with self._named(f"rank {to}"):
            self._connections.send(to, _bytes(tensor.cpu().contiguous()))

    def receive(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Fills `tensor`, which is contiguous, from what rank `source` sends."""
        here = tensor.cpu()
        with self._named(f"rank {source}"), self._waiting():
            self._connections.receive(source, _bytes(here))
        return tensor if here is tensor else tensor.copy_(here)

    def receive_numbers(self, source: int) -> NDArray[np.int64]:
        """The next message of rank `source`, int64 of any length."""
        with self._named(f"rank {source}"), self._waiting():
            return np.frombuffer(self._connections.receive(source), np.int64)

    def say_alive(self) -> None:
        """To all ranks, so that one without work can tell rest from a cable that has been cut. From any thread."""
        with self._named("another rank"):
            self._connections.say_alive()

    def sum_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over this stage's shards, in place."""
        if self.mesh.tensor > 1:
            with self._named(self._peers), self._waiting():
                if self._shared is not None and SharedSum.takes(tensor):
                    self._shared(tensor)
                else:
                    dist.all_reduce(tensor, group=self._stage)
        return tensor

    def agree(self, work: Callable[[], Any]) -> Any:
        """Does `work` on every rank. Where it fails on one, DistributedError on all, naming that rank and its cause."""
        problem, result, cause = "", None, None
        try:
            result = work()
        except Exception as error:  # of any kind: the other ranks wait for an answer, and must hear of it
            problem, cause = f"rank {self.rank} on {self.host}: {error or type(error).__name__}", error
        report = torch.zeros(_MAX_REPORT, dtype=torch.uint8)
        words = problem.encode()[:_MAX_REPORT]
        report[: len(words)] = torch.frombuffer(bytearray(words or b"\0"), dtype=torch.uint8)[: len(words)]
        reports = [torch.empty_like(report) for _ in range(self.size)]
        with self._named("another rank"):
            dist.all_gather(reports, report, group=self._loading)  # loading may take longer than an answer
        for other in reports:
            if words := bytes(other.tolist()).rstrip(b"\0"):
                raise DistributedError(words.decode(errors="replace")) from cause
        return result

    def least(self, numbers: list[int]) -> list[int]:
        """The least of each number over all ranks."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        with self._named("another rank"):
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor.tolist()

    def close(self) -> None:
        """Waits until the others have read what was sent, unless a rank has been lost, then lets go of the links."""
        if not self._lost:
            self._connections.close()
        dist.destroy_process_group()

    def _open_shared(self, timeout: float) -> SharedSum | None:
        """The sum through memory, where all shards of this stage see the same."""
        leader = self.rank - self.rank % self.mesh.tensor

        def all_agree(mine: bool) -> bool:
            answer = torch.tensor(int(mine))
            dist.all_reduce(answer, dist.ReduceOp.MIN, group=self._stage)
            return bool(answer)

        def share(tensor: torch.Tensor) -> None:
            dist.broadcast(tensor, leader, group=self._stage)

        return open_shared_sum(self.rank - leader, self.mesh.tensor, timeout, share, all_agree)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - begun

    @contextmanager
    def _named(self, peer: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            self._lost, words = True, str(error)
            cause = "does not answer" if "imed out" in words or "imeout" in words else "has gone"
            detail = first_line(error).split("] ", 1)[-1].split(". ")[0][:200]  # without a source file's path
            raise DistributedError(f"rank {self.rank} on {self.host}: {peer} {cause} ({detail})") from None


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _leave() -> None:
    """Where a rank ends by an error: gloo's threads would abort the process that ends around them."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
