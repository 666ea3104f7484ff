"""From a Batch to a Step: made anew for chunks; for decodes, written into buffers that a captured graph reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from maestrale.batch import Batch, CacheLayout
from maestrale.torch_backend.draw import Drawer
from maestrale.torch_backend.staging import put
from maestrale.torch_backend.triton.model import Step
from maestrale.torch_backend.triton.tiles import Tiles, deal, n_splits

# Sequences of a captured step; a batch takes the next larger one.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def is_decode(batch: Batch) -> bool:
    """Whether every sequence brings one token, and there is a captured size for them."""
    return len(batch.token_ids) == len(batch.starts) - 1 <= SIZES[-1]


def make_step(batch: Batch, n_heads: int, n_kv_heads: int, device: torch.device, drawer: Drawer) -> Step:
    sequences = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
    every = len(batch.logit_rows) == len(batch.token_ids)  # they ascend, so they are all rows in order

    def put_int32(array: np.ndarray) -> torch.Tensor:
        return put(array.astype(np.int32), device)

    return Step(
        drawer.follow(put_int32(batch.token_ids), batch.follows),
        put_int32(batch.positions),
        put_int32(sequences),
        [put_int32(table) for table in batch.tables],
        deal(batch.starts, n_heads, n_kv_heads, device),
        None if every else put(batch.logit_rows, device),
    )


class DecodeStep:
    """A step of up to `size` decoding sequences in buffers that stay where they are; the rest is padding.

    work: Step → logits [size, V]. On a GPU it is captured at the first use and replayed from then on, so it must not
    wait for the device, nor depend on the numbers in the step. memory: the pool that captured
    graphs share (torch.cuda.graph_pool_handle).
    """

    def __init__(
        self,
        size: int,
        layout: CacheLayout,
        n_kv_heads: int,
        device: torch.device,
        work: Callable[[Step], torch.Tensor],
        drawer: Drawer,
        memory: Any,
    ):
        widths = (1, 1, *layout.rings)  # of tokens, positions, tables; all of them travel in one copy
        pinned = device.type == "cuda"
        self._host = torch.empty(size * sum(widths), dtype=torch.int32, pin_memory=pinned)
        self._device = torch.empty_like(self._host, device=device)
        parts = self._device.split([size * width for width in widths])
        self._arrays = [part.numpy().reshape(size, -1) for part in self._host.split([size * width for width in widths])]
        every = torch.arange(size, dtype=torch.int32, device=device)
        decodes = torch.stack([every, every, torch.ones_like(every)], 1)
        tiles = Tiles(decodes[:0], decodes, 1, n_splits(size, n_kv_heads))
        tables = [part.view(size, -1) for part in parts[2:]]
        self._step = Step(parts[0], parts[1], every, tables, tiles, None)
        self._page_size, self._work, self._drawer, self._memory = layout.page_size, work, drawer, memory
        self._sent = torch.cuda.Event() if pinned else None
        self._captured: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None

    def run(self, batch: Batch) -> torch.Tensor:
        """logits [T, V] of the batch's rows."""
        count = len(batch.token_ids)
        if self._sent is not None:
            self._sent.synchronize()  # what was sent last has left the buffer; of an event never recorded: at once
        tokens, positions, *tables = self._arrays
        tokens[:count, 0], positions[:count, 0] = batch.token_ids, batch.positions
        tokens[count:], positions[count:] = 0, -1
        pages = int(batch.positions.max()) // self._page_size + 1  # those behind are not looked at
        for array, table in zip(tables, batch.tables, strict=True):
            array[:count, :pages] = table[:, :pages]
        self._device.copy_(self._host, non_blocking=True)
        self._drawer.follow(self._step.tokens_T, batch.follows)
        if self._sent is None:
            return self._work(self._step)[:count]
        self._sent.record()
        if self._captured is None:
            self._captured = self._capture()
        graph, logits = self._captured
        graph.replay()
        return logits[:count].clone()  # the next replay writes over them, perhaps before they are read

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Runs once in the open, which compiles every kernel, then once more into a graph."""
        self._work(self._step)
        torch.cuda.synchronize(self._device.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._work(self._step)
        return graph, logits
