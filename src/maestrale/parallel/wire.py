"""A Batch as one flat int64 array, so that it travels between ranks without a pickle."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout
from maestrale.errors import DistributedError


def pack_batch(batch: Batch, layout: CacheLayout) -> NDArray[np.int64]:
    """[T, B, N, experts, adapters (B or 0), copies of each kind …, columns of each kind's table …, then every array's
    elements in the order of `Batch`'s fields]. Of page tables go only the columns that this step's positions reach: few
    of a long context's thousands."""
    reached = int(batch.positions.max()) // layout.page_size + 1
    tables = [table[:, :reached] for table in batch.tables]
    adapters = np.empty(0, np.int64) if batch.adapters is None else batch.adapters
    head = [len(batch.token_ids), len(batch.starts) - 1, len(batch.logit_rows), int(batch.experts), len(adapters)]
    head += [*map(len, batch.copies), *(table.shape[1] for table in tables)]
    arrays = [batch.token_ids, batch.positions, batch.starts, *tables, *batch.copies, batch.logit_rows, adapters]
    return np.concatenate([np.array(head, np.int64), *(array.reshape(-1) for array in arrays)])


def unpack_batch(flat: NDArray[np.int64], layout: CacheLayout) -> Batch:
    """The batch of `pack_batch`. DistributedError where the length is not what its head says."""
    kinds = len(layout.rings)
    head = 5 + 2 * kinds
    if len(flat) < head:
        raise DistributedError(f"a batch of {len(flat)} numbers came: the ranks run different versions or options")
    T, B, N, experts, adapted, *counts = flat[:head].tolist()
    copies, columns = counts[:kinds], counts[kinds:]
    shapes = [(T,), (T,), (B + 1,), *((B, width) for width in columns), *((n, 2) for n in copies), (N,), (adapted,)]
    sizes = [prod(shape) for shape in shapes]
    whole = min(T, B, N, *counts) >= 0 and adapted in (0, B) and all(map(int.__le__, columns, layout.rings))
    if not whole or sum(sizes) != len(flat) - head:
        raise DistributedError(
            f"a batch says that it has {sum(sizes)} numbers and has {len(flat) - head}: the ranks run different "
            "versions or options"
        )
    parts = np.split(flat[head:], np.cumsum(sizes)[:-1])
    tokens, positions, starts, *rest = (array.reshape(shape) for array, shape in zip(parts, shapes, strict=True))
    tables = [np.zeros((B, ring), np.int64) for ring in layout.rings]
    for table, width, part in zip(tables, columns, rest, strict=False):
        table[:, :width] = part
    adapters = rest[-1] if adapted else None
    return Batch(
        tokens, positions, starts, tuple(tables), tuple(rest[kinds : 2 * kinds]), rest[-2], bool(experts), adapters
    )
