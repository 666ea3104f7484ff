"""The links between ranks, by torch.distributed: gloo between processors, NCCL between GPUs.

Tensors go from rank to rank by sends that do not wait; a send's handle and tensor are kept until it is done, since
gloo loses a message whose handle is dropped, and waiting twice on a finished send blocks until the timeout. Sums over
shards of one host go through memory that they share.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from maestrale.errors import DistributedError, UsageError
from maestrale.mesh import Mesh
from maestrale.parallel.shared import SharedSum, open_shared_sum

_FOREVER = timedelta(days=365)  # how long a rank waits for others to load; a dead peer is seen at once all the same
_MAX_REPORT = 2048  # bytes of a rank's report
_MAX_IN_FLIGHT = 256  # sends that are not waited for
_numbers = itertools.count()  # of links in this process, alike on all ranks


def world() -> tuple[int, int, int]:
    """(rank, ranks, rank on this host) as torchrun or Open MPI tell; (0, 1, 0) alone."""
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ):
        if size in os.environ:
            try:
                return tuple(int(os.environ[name]) for name in (rank, size, local))  # type: ignore[return-value]
            except (KeyError, ValueError):
                raise UsageError(f"{rank}, {size} and {local} must all be whole numbers: start with torchrun") from None
    return 0, 1, 0


def ranks_on_this_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1)


class Link:
    """One rank's ends of the links. `stage` collectives are among the shards of this rank's stage.

    waited: seconds spent in `receive` and `sum_stage`, so far.
    """

    def __init__(self, mesh: Mesh, timeout: float):
        """timeout: seconds after which a peer that should have answered counts as hanging."""
        self.mesh = mesh
        self.rank, self.size, self.local_rank = world()
        self.host, self.ranks_on_host = socket.gethostname(), ranks_on_this_host()
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
        self.waited, self._lost, self.timeout = 0.0, False, timeout
        self._sending = threading.Lock()
        if "OMPI_COMM_WORLD_SIZE" in os.environ:
            _openmpi_rendezvous(self.size)
        if self.ranks_on_host == self.size and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody from outside has to reach us
        os.environ.setdefault("RANK", str(self.rank))
        os.environ.setdefault("WORLD_SIZE", str(self.size))
        with self._named("rendezvous"):
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
            # The store outlives a restart by torchrun, and links of before: their addresses would be found in it.
            own = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_numbers)}", store)
            dist.init_process_group(
                "gloo", store=own, rank=self.rank, world_size=self.size, timeout=timedelta(seconds=timeout)
            )
            self._loading = dist.new_group(timeout=_FOREVER)
            self._idle = dist.new_group(timeout=timedelta(seconds=timeout))
            stages = [list(range(s * mesh.tensor, (s + 1) * mesh.tensor)) for s in range(mesh.pipeline)]
            groups = [dist.new_group(ranks, timeout=timedelta(seconds=timeout)) for ranks in stages]
            self._stage = groups[self.rank // mesh.tensor]
            self._shared = self._open_shared(timeout) if mesh.tensor > 1 else None
        atexit.register(_leave)

    def send(self, tensor: torch.Tensor, to: int, idle: bool = False) -> None:
        """Begins to send; `tensor` must not change afterwards. idle: to a `receive(idle=True)`. From any thread."""
        with self._sending:
            while self._sends and (len(self._sends) > _MAX_IN_FLIGHT or self._sends[0][0].is_completed()):
                handle, _ = self._sends.popleft()
                if not handle.is_completed():
                    with self._named(f"a send by rank {self.rank}"):
                        handle.wait()
            tensor = tensor.contiguous()
            with self._named(f"rank {to}"):
                handle = dist.isend(tensor, to, group=self._idle if idle else None)
            if handle is not None:
                self._sends.append((handle, tensor))

    def receive(self, tensor: torch.Tensor, source: int, idle: bool = False) -> torch.Tensor:
        """Fills `tensor` from what rank `source` sends. idle: what it sends with `idle`, apart from all else."""
        with self._named(f"rank {source}"), self._waiting():
            dist.recv(tensor, source, group=self._idle if idle else None)
        return tensor

    def sum_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over this stage's shards, in place."""
        if self.mesh.tensor > 1:
            with self._named(f"a shard of stage {self.rank // self.mesh.tensor}"), self._waiting():
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
        except Exception as error:
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
        """Waits for what is still being sent, unless a rank has been lost, then lets go of the links."""
        while self._sends and not self._lost:
            handle, _ = self._sends.popleft()
            if not handle.is_completed():
                with self._named("the last messages"):
                    handle.wait()
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
        except (RuntimeError, dist.DistBackendError) as error:
            self._lost, words = True, str(error)
            cause = "does not answer" if "imed out" in words or "imeout" in words else "has gone"
            detail = words.splitlines()[0].split("] ", 1)[-1].split(". ")[0][:200]  # without a source file's path
            raise DistributedError(f"rank {self.rank} on {self.host}: {peer} {cause} ({detail})") from None


def _leave() -> None:
    """Where a rank ends by an error: gloo's threads would abort the process that ends around them."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _openmpi_rendezvous(size: int) -> None:
    """Open MPI starts processes but says no address; on one host it is this one."""
    if "MASTER_ADDR" in os.environ:
        return
    if os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != str(size):
        raise UsageError("several hosts under mpirun: set MASTER_ADDR and MASTER_PORT to an address of rank 0's host")
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    # Two jobs on one host must not meet: a port from the job's own number.
    job = os.environ.get("PMIX_NAMESPACE", "0")
    os.environ.setdefault("MASTER_PORT", str(20_000 + sum(map(ord, job)) * 31 % 20_000))
