"""Texts as vectors: the mean of a text's states after the last norm, or the last of them, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import lots, read_alone
from maestrale.native_backend.load import Body


def embed(
    body: Body, texts: Sequence[Sequence[int]], max_chunk: int, last: bool
) -> Iterator[list[NDArray[np.float32]] | None]:
    """Float32 [dim] of each text at the end; before, None after each chunk, so that the caller may do something else in
    between."""
    config, vectors = body.config, list[NDArray[np.float32]]()
    for lot in lots(texts, max_chunk):
        layout, batches = read_alone(lot, config.windows, max_chunk)
        model = body.twin(layout)
        found_BD = np.zeros((len(lot), config.dim), np.float32)
        lengths_B1 = np.array([[len(text)] for text in lot], np.float32)
        for batch in batches:
            hidden_TD = np.empty((len(batch.token_ids), config.dim), np.float32)
            model.step(*batch.arrays, hidden_out=hidden_TD)
            scale_T1 = 1 / np.sqrt(np.square(hidden_TD).mean(-1, keepdims=True) + np.float32(config.norm_eps))  # N3
            normed_TD = hidden_TD * scale_T1 * body.norm
            if last:
                found_BD = normed_TD[batch.starts[1:] - 1]  # a single text's last chunk comes last
            else:
                found_BD += np.add.reduceat(normed_TD, batch.starts[:-1])
            yield None
        vectors.extend(found_BD if last else found_BD / lengths_B1)
    yield vectors
