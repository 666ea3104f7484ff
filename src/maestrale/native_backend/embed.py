"""A text as one vector: the mean of its tokens' states after the last norm, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import CacheLayout
from maestrale.native_backend.load import Body


def embed(body: Body, token_ids: Sequence[int], max_chunk: int) -> Iterator[NDArray[np.float32] | None]:
    """Float32 [dim] at the end; before, None after each chunk, so that the caller may do something else in between.

    The keys and values lie in a cache of their own, whose rings never wrap, and are gone with it.
    """
    n, config = len(token_ids), body.config
    windows, pages = config.windows, -(-n // 16)
    model = body.twin(CacheLayout(16, n, max_chunk, windows, (pages,) * len(windows), (pages,) * len(windows)))
    total_D: NDArray[np.float32] = np.zeros(config.dim, np.float32)
    for start, end in pairwise([*range(0, n, max_chunk), n]):
        hidden_TD = np.empty((end - start, config.dim), np.float32)
        model.step(
            np.array(token_ids[start:end], np.int64),
            np.arange(start, end),
            np.array([0, end - start]),
            (np.arange(pages)[None],) * len(windows),
            (np.empty((0, 2), np.int64),) * len(windows),
            np.arange(end - start),
            hidden_out=hidden_TD,
        )
        scale_T1 = 1 / np.sqrt(np.square(hidden_TD).mean(-1, keepdims=True) + np.float32(config.norm_eps))  # N3
        total_D += (hidden_TD * scale_T1 * body.norm).sum(0)
        if end < n:
            yield None
    yield total_D / np.float32(n)
