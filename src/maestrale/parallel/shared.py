"""The sum over the shards of a stage that run on one host, through memory that they share (csrc/shared_sum.h)."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maestrale.native_backend import kernels

_FOLDER = Path("/dev/shm")
_SLOT = 1 << 18  # bytes of a piece; what is longer goes piece by piece
_PATIENCE = 0.05  # seconds of waiting for a peer before it is asked whether it lives
_ID_BYTES = 16


class SharedSum:
    """One rank's end. Each holds a lock on a byte of the file as long as it lives: so a peer that dies is seen,
    however it died."""

    def __init__(self, file: int, rank: int, ranks: int, timeout: float):
        size = kernels.native.SharedSum.bytes(ranks, _SLOT)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        self._file, self._timeout = file, timeout
        segment = np.frombuffer(mmap(file, size), np.uint8)
        self._sum = kernels.native.SharedSum(segment, rank, ranks, _SLOT)

    @staticmethod
    def takes(tensor: torch.Tensor) -> bool:
        return (
            tensor.dtype in (torch.float32, torch.bfloat16) and tensor.device.type == "cpu" and tensor.is_contiguous()
        )

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds `tensor` up over the ranks, in place: in fp32, in their order, so that all get the same bits.
        RuntimeError, as gloo has it, where one does not come."""
        content = tensor.view(-1).view(torch.uint8).numpy()
        half, deadline = tensor.dtype is torch.bfloat16, None
        while (waited_for := self._sum.sum(content, half, _PATIENCE)) >= 0:
            deadline = deadline or time.monotonic() + self._timeout
            if not self._lives(waited_for):
                raise RuntimeError(f"shard {waited_for} has let go of the shared memory")
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out: shard {waited_for} has not come in {self._timeout:g} s")
        return tensor

    def _lives(self, rank: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return False


def open_shared_sum(
    rank: int, ranks: int, timeout: float, share: Callable[[torch.Tensor], Any], all_agree: Callable[[bool], bool]
) -> SharedSum | None:
    """The sum over a group of ranks; None where they do not all see the same memory, or one has no kernels.

    share: makes a tensor that of rank 0. all_agree: whether all ranks said so. The file has no name any more when this
    returns, so nothing stays behind however the job ends.
    """
    name = torch.tensor(list(secrets.token_bytes(_ID_BYTES)), dtype=torch.uint8)

    def attempt(flags: int) -> SharedSum | None:
        if kernels.native is not None:
            with suppress(OSError):
                return SharedSum(_open(name, flags, ranks), rank, ranks, timeout)
        return None

    mine = attempt(os.O_CREAT | os.O_EXCL) if rank == 0 else None
    share(name)
    if rank:
        mine = attempt(0)
    together = all_agree(mine is not None)
    if rank == 0:
        with suppress(OSError):
            _path(name).unlink()
    return mine if together else None


def _path(name: torch.Tensor) -> Path:
    return _FOLDER / f"maestrale-{bytes(name.tolist()).hex()}"


def _open(name: torch.Tensor, flags: int, ranks: int) -> int:
    file = os.open(_path(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    if flags:
        os.posix_fallocate(file, 0, kernels.native.SharedSum.bytes(ranks, _SLOT))  # else a full /dev/shm would kill us
    return file
