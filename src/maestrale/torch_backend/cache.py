"""Keys and values in pages, and one step's view of them: write first, then attend.

The law (where a key lies, who sees whom) is in batch.py; this file holds the tensors and turns a Batch into the
index tensors that the kernels read, once a step and for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout, slots, visible
from maestrale.config import ModelConfig
from maestrale.torch_backend.ops.groups import FP8, Group, bits
from maestrale.torch_backend.staging import put

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[Group]], torch.Tensor]


FP8_LARGEST = torch.finfo(FP8).max  # 448


class PagedCache:
    """The pools of every kind of layer; a page number means the same page in all layers of its kind.

    dtype: what is computed in. fp8: keys (turned) and values are kept in e4m3 instead, rounded to nearest on a scale of
    1: in steps of 2^-3 of their power of two, down to 2^-6, evenly below; what lies beyond 448 becomes 448.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: CacheLayout,
        dtype: torch.dtype,
        device: torch.device,
        kernel: Kernel,
        fp8: bool = False,
    ):
        self.layout, self.kernel, self.dtype, self.device, self.fp8 = layout, kernel, dtype, device, fp8
        self.kind_of_layer = [layout.windows.index(window) for window in config.sliding_window]
        self.index_in_kind = [self.kind_of_layer[:i].count(kind) for i, kind in enumerate(self.kind_of_layer)]
        # k and v of a kind: [2, layers of the kind, slots, G, C]. Left unwritten, so that a large pool takes memory
        # only where it is used; no slot is read before it is written.
        self.pools = [
            torch.empty(
                (2, self.kind_of_layer.count(kind), pages * layout.page_size, config.n_kv_heads, config.head_dim),
                dtype=FP8 if fp8 else dtype,
                device=device,
            )
            for kind, pages in enumerate(layout.pages)
        ]

    def begin(self, batch: Batch) -> StepView:
        """Do the batch's page copies and work out where its tokens are written and which keys they see."""
        sequences = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
        written, groups = [], []
        for kind, (window, ring) in enumerate(zip(self.layout.windows, self.layout.rings, strict=True)):
            self.copy_pages(kind, batch.copies[kind])
            where = slots(batch.tables[kind], sequences, batch.positions, self.layout.page_size, ring)
            written.append(put(where, self.device))
            groups.append(self._groups(batch, kind, window))
        return StepView(self, written, groups)

    def copy_pages(self, kind: int, copies: NDArray[np.int64]) -> None:
        """copies: a Batch's, of this kind of layer."""
        if len(copies):
            source, target = put(copies.T, self.device)
            paged = bits(self.pools[kind]).unflatten(2, (-1, self.layout.page_size))
            # All sources are read before any target is written: a page freed in this step may be a target in it too.
            paged.index_copy_(2, target, paged.index_select(2, source))

    def _groups(self, batch: Batch, kind: int, window: int | None) -> list[Group]:
        """A group for each chunk; the sequences that bring one token share a group with others of like length."""
        decodes: dict[int, list[int]] = {}
        groups = []
        for b, (start, end) in enumerate(zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True)):
            if end - start > 1:
                groups.append(self._group(batch, kind, window, [b]))
            else:
                length = int(batch.positions[start]) + 1
                kept = length if window is None else min(length, window)
                decodes.setdefault(kept.bit_length(), []).append(b)  # padded to less than twice their own length
        groups.extend(self._group(batch, kind, window, members) for members in decodes.values())
        return groups

    def _group(self, batch: Batch, kind: int, window: int | None, members: list[int]) -> Group:
        rows = np.stack([np.arange(batch.starts[b], batch.starts[b + 1]) for b in members])
        query = batch.positions[rows]
        oldest = np.zeros(len(members), np.int64) if window is None else np.maximum(query[:, 0] - window + 1, 0)
        longest = int((query[:, -1] - oldest).max()) + 1
        key = oldest[:, None] + np.arange(longest)  # positions; those after the last query are padding
        # Padding reads the last query's own key: what it reads is not seen, but 0 * NaN would be if another's were NaN.
        stored = np.minimum(key, query[:, -1:])
        table, ring = batch.tables[kind][members], self.layout.rings[kind]
        where = slots(table, np.arange(len(members))[:, None], stored, self.layout.page_size, ring)
        mask = put(visible(query[:, :, None], key[:, None, :], window), self.device)
        bias = torch.zeros(mask.shape, dtype=self.dtype, device=self.device).masked_fill_(~mask, -torch.inf)
        return Group(put(rows, self.device), put(where, self.device), bias)


class StepView:
    """One step's window on the cache; calling it is the model's `attend`."""

    def __init__(self, cache: PagedCache, written: list[torch.Tensor], groups: list[list[Group]]):
        self.cache, self.written, self.groups = cache, written, groups

    def __call__(self, layer: int, q_THC: torch.Tensor, k_TGC: torch.Tensor, v_TGC: torch.Tensor) -> torch.Tensor:
        kind = self.cache.kind_of_layer[layer]
        k_SGC, v_SGC = self.cache.pools[kind][:, self.cache.index_in_kind[layer]]
        for pool_SGC, new_TGC in ((k_SGC, k_TGC), (v_SGC, v_TGC)):
            kept_TGC = new_TGC.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8) if self.cache.fp8 else new_TGC
            bits(pool_SGC).index_copy_(0, self.written[kind], bits(kept_TGC))
        return self.cache.kernel(q_THC, k_SGC, v_SGC, self.groups[kind])
