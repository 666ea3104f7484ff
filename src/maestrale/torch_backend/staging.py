"""From the host to a GPU: weights from mapped files through two pinned buffers, of which one is filled while the other
travels; a step's arrays without waiting for what the GPU is doing.

A copy straight from mapped memory makes the driver do the first by itself, in small pieces and one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_BUFFER = 64 << 20


def put(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device; on a GPU in the order of its stream, while the host goes on."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Staging:
    """Copies tensors to `device`; on the CPU in the same way, with plain memory in place of pinned."""

    def __init__(self, device: torch.device, size: int = _BUFFER):
        self.device, self._gpu = device, device.type == "cuda"
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=self._gpu) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if self._gpu else None
        self._sent = [torch.cuda.Event() for _ in self._buffers] if self._gpu else []
        self._next = 0

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor's values on the device; the source may change as soon as this returns."""
        target = torch.empty_like(source, device=self.device)
        if self._stream is not None:  # target's memory may just have been given back by work that is still under way
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        into, size = target.view(-1).view(torch.uint8), len(self._buffers[0])
        for start, part in enumerate(source.view(-1).view(torch.uint8).split(size)):
            self._piece(part, into[start * size : start * size + len(part)])
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return target

    def _piece(self, part: torch.Tensor, into: torch.Tensor) -> None:
        i, self._next = self._next, 1 - self._next
        buffer = self._buffers[i][: len(part)]
        if self._stream is None:
            into.copy_(buffer.copy_(part))
            return
        self._sent[i].synchronize()  # of an event that was never recorded: returns at once
        buffer.copy_(part)
        with torch.cuda.stream(self._stream):
            into.copy_(buffer, non_blocking=True)
        self._sent[i].record(self._stream)
