"""Texts as vectors: the mean of a text's states after the last norm, or the last of them, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import lots, read_alone
from maestrale.torch_backend.adapters import Adapters
from maestrale.torch_backend.cache import Kernel, PagedCache
from maestrale.torch_backend.model import Transformer


def embed(
    model: Transformer,
    texts: Sequence[Sequence[int]],
    last: bool,
    kernel: Kernel,
    max_chunk: int,
    adapters: Adapters | None,
) -> Iterator[list[NDArray[np.float32]] | None]:
    """Float32 [dim] of each text at the end; before, None after each chunk, so that the caller may do something else in
    between."""
    weight, vectors = model.norm.weight, list[NDArray[np.float32]]()
    for lot in lots(texts, max_chunk):
        layout, batches = read_alone(lot, model.config.windows, max_chunk)
        lengths_B1 = torch.tensor([[len(text)] for text in lot], device=weight.device)
        with torch.inference_mode():
            cache = PagedCache(model.config, layout, weight.dtype, weight.device, kernel)
            found_BD = torch.zeros(len(lot), model.config.dim, device=weight.device)
        for batch in batches:
            if adapters is not None:
                adapters.begin(batch, weight.device)  # that no row has one
            with torch.inference_mode():
                tokens_T, positions_T, starts = (
                    torch.from_numpy(array).to(weight.device)
                    for array in (batch.token_ids, batch.positions, batch.starts)
                )
                hidden_TD = model.hidden_states(tokens_T, positions_T, cache.begin(batch)).float()
                if last:
                    found_BD = hidden_TD[starts[1:] - 1]  # a single text's last chunk comes last
                else:
                    found_BD += torch.segment_reduce(hidden_TD, "sum", lengths=starts.diff())
            yield None
        vectors.extend((found_BD if last else found_BD / lengths_B1).cpu().numpy())
    yield vectors
