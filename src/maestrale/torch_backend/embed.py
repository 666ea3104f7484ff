"""A text as one vector: the mean of its tokens' states after the last norm, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout
from maestrale.torch_backend.cache import Kernel, PagedCache
from maestrale.torch_backend.model import Transformer


def embed(
    model: Transformer,
    token_ids: Sequence[int],
    kernel: Kernel,
    max_chunk: int,
    begin: Callable[[Batch], None],
) -> Iterator[NDArray[np.float32] | None]:
    """Float32 [dim] at the end; before, None after each chunk, so that the caller may do something else in between.

    begin: called with each chunk before the model is. The keys and values lie in a cache of their own, whose rings
    never wrap, and are gone with it.
    """
    n, weight = len(token_ids), model.norm.weight
    windows = model.config.windows
    pages = -(-n // 16)
    layout = CacheLayout(16, n, max_chunk, windows, (pages,) * len(windows), (pages,) * len(windows))
    with torch.inference_mode():
        cache = PagedCache(model.config, layout, weight.dtype, weight.device, kernel)
        total_D = torch.zeros(model.config.dim, device=weight.device)
    for start, end in pairwise([*range(0, n, max_chunk), n]):
        batch = Batch(
            token_ids=np.array(token_ids[start:end], np.int64),
            positions=np.arange(start, end),
            starts=np.array([0, end - start]),
            tables=(np.arange(pages)[None],) * len(windows),
            copies=(np.empty((0, 2), np.int64),) * len(windows),
            logit_rows=np.arange(end - start),
        )
        begin(batch)
        with torch.inference_mode():
            tokens_T, positions_T = (
                torch.from_numpy(array).to(weight.device) for array in (batch.token_ids, batch.positions)
            )
            total_D += model.hidden_states(tokens_T, positions_T, cache.begin(batch)).float().sum(0)
        if end < n:
            yield None
    yield (total_D / n).cpu().numpy()
