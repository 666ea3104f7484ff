"""A text as one vector: the mean of its tokens' states after the last norm, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Batch, read_alone
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

    begin: called with each chunk before the model is.
    """
    weight = model.norm.weight
    layout, batches = read_alone(token_ids, model.config.windows, max_chunk)
    with torch.inference_mode():
        cache = PagedCache(model.config, layout, weight.dtype, weight.device, kernel)
        total_D = torch.zeros(model.config.dim, device=weight.device)
    for number, batch in enumerate(batches):
        if number:
            yield None
        begin(batch)
        with torch.inference_mode():
            tokens_T, positions_T = (
                torch.from_numpy(array).to(weight.device) for array in (batch.token_ids, batch.positions)
            )
            total_D += model.hidden_states(tokens_T, positions_T, cache.begin(batch)).float().sum(0)
    yield (total_D / len(token_ids)).cpu().numpy()
