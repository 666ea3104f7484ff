"""A Batch as one flat int64 array, so that it travels between ranks without a pickle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout
from maestrale.errors import DistributedError


def pack_batch(batch: Batch) -> NDArray[np.int64]:
    """[T, B, N, copies of each kind …, then every array's elements in the order of `Batch`'s fields]."""
    head = [len(batch.token_ids), len(batch.starts) - 1, len(batch.logit_rows), *map(len, batch.copies)]
    arrays = [batch.token_ids, batch.positions, batch.starts, *batch.tables, *batch.copies, batch.logit_rows]
    return np.concatenate([np.array(head, np.int64), *(array.reshape(-1) for array in arrays)])


def unpack_batch(flat: NDArray[np.int64], layout: CacheLayout) -> Batch:
    """The batch of `pack_batch`. DistributedError where the length is not what its head says."""
    kinds = len(layout.rings)
    if len(flat) < 3 + kinds:
        raise DistributedError(f"a batch of {len(flat)} numbers came: the ranks run different versions or options")
    T, B, N, *copies = flat[: 3 + kinds].tolist()
    shapes = [(T,), (T,), (B + 1,), *((B, ring) for ring in layout.rings), *((n, 2) for n in copies), (N,)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    if min(T, B, N, *copies) < 0 or sum(sizes) != len(flat) - 3 - kinds:
        raise DistributedError(
            f"a batch says that it has {sum(sizes)} numbers and has {len(flat) - 3 - kinds}: the ranks run different "
            "versions or options"
        )
    parts = np.split(flat[3 + kinds :], np.cumsum(sizes)[:-1])
    tokens, positions, starts, *rest = (array.reshape(shape) for array, shape in zip(parts, shapes, strict=True))
    return Batch(tokens, positions, starts, tuple(rest[:kinds]), tuple(rest[kinds : 2 * kinds]), rest[-1])
