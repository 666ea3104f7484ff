"""One file of tensors, mapped into memory: what every format's room gives once its header is understood."""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.errors import CheckpointError, MemoryLimitError

# Python names it since 3.13 only.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class Entry:
    """A tensor's dtype (safetensors name), shape, and the bytes [start, end) of the file that hold it row-major."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class MappedFile:
    """A whole file as uint8 [bytes]. The mapping is private: writing into it reaches no disk.

    CheckpointError where the file cannot be read. Views keep the mapping alive, whatever becomes of this object.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            before = os.stat(self.path)
            if stat.S_ISDIR(before.st_mode):
                raise CheckpointError(f"{self.path}: is a folder; expected a file")
            if not stat.S_ISREG(before.st_mode):
                raise CheckpointError(f"{self.path}: is not a regular file")
            with open(self.path, "rb") as file:
                self._state = _state(os.fstat(file.fileno()))
                size = self._state[0]
                if size == 0:
                    raise CheckpointError(f"{self.path}: the file is empty")
                # Without a reservation, a file larger than the memory can be mapped too.
                flags = mmap.MAP_PRIVATE | _NO_RESERVE
                self._map = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise MemoryLimitError(
                    f"{self.path}: no address space to map it: raise the limit (ulimit -v)"
                ) from None
            raise CheckpointError(f"{self.path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
        self.data: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    def release(self, start: int, end: int) -> None:
        """Gives back the memory of the whole pages inside [start, end); what was written into them is lost."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def verify_unchanged(self) -> None:
        try:
            unchanged = _state(os.stat(self.path)) == self._state
        except OSError:
            unchanged = False
        if not unchanged:
            raise CheckpointError(f"{self.path}: changed while it was read; load it again when its writer is done")


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file, by the file's names. metadata: what a .safetensors file says of itself."""

    mapped: MappedFile
    entries: dict[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.mapped.path

    def tensor(self, name: str) -> StoredTensor:
        """A view, except where the file holds the elements at an address that their size does not divide."""
        self.mapped.verify_unchanged()  # reading where a shrunken file has no more bytes would kill the process
        entry = self.entries[name]
        data = self.mapped.data[entry.start : entry.end]
        width = len(data) // entry.size if entry.size else 1
        if entry.start % width:
            data = data.copy()
        return StoredTensor(entry.dtype, entry.shape, data)

    def release(self, name: str) -> None:
        entry = self.entries[name]
        self.mapped.release(entry.start, entry.end)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
