"""A text as one vector: the mean of its tokens' states after the last norm, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import read_alone
from maestrale.native_backend.load import Body


def embed(body: Body, token_ids: Sequence[int], max_chunk: int) -> Iterator[NDArray[np.float32] | None]:
    """Float32 [dim] at the end; before, None after each chunk, so that the caller may do something else in between."""
    config = body.config
    layout, batches = read_alone(token_ids, config.windows, max_chunk)
    model = body.twin(layout)
    total_D: NDArray[np.float32] = np.zeros(config.dim, np.float32)
    for number, batch in enumerate(batches):
        if number:
            yield None
        hidden_TD = np.empty((len(batch.token_ids), config.dim), np.float32)
        model.step(*batch.arrays, hidden_out=hidden_TD)
        scale_T1 = 1 / np.sqrt(np.square(hidden_TD).mean(-1, keepdims=True) + np.float32(config.norm_eps))  # N3
        total_D += (hidden_TD * scale_T1 * body.norm).sum(0)
    yield total_D / np.float32(len(token_ids))
