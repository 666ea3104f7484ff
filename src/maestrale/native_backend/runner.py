"""The native backend as the engine sees it: a Runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import Batch, CacheLayout, StepOutput
from maestrale.checkpoint.reader import Checkpoint
from maestrale.config import ModelConfig
from maestrale.errors import MemoryLimitError
from maestrale.memory import keep_rows
from maestrale.native_backend.embed import embed
from maestrale.native_backend.load import Body, load_model


class NativeRunner:
    """A model and its cache on this machine's processor. model: the extension's Model of all layers; body: its weights
    below the head."""

    def __init__(self, model: Any, layout: CacheLayout, body: Body):
        self.model, self._layout, self._body = model, layout, body

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def step(self, batch: Batch) -> StepOutput:
        return StepOutput(*compute(self.model, self._body.config, batch))

    def embed(self, texts: Sequence[Sequence[int]], last: bool = False) -> Iterator[list[NDArray[np.float32]] | None]:
        with memory_errors():
            yield from embed(self._body, texts, self._layout.max_chunk, last)


def compute(
    model: Any, config: ModelConfig, batch: Batch, hidden_TD: NDArray[np.float32] | None = None, last: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.int16] | None]:
    """(logits [N, V], or of layers that are not the `last` hidden rows [T, dim]; the experts [N, layers, K] of the
    wanted rows, where they are asked for). config: of `model`'s layers. hidden_TD: what those before them gave."""
    moe, T, N = config.moe if batch.experts else None, len(batch.token_ids), len(batch.logit_rows)
    with memory_errors():
        out = np.empty((N, config.vocab_size) if last else (T, config.dim), np.float32)
        chosen = None if moe is None else np.empty((config.n_layers, T, moe.num_experts_per_tok), np.int16)
        outputs = {"logits": out} if last else {"hidden_out": out}
        model.step(*batch.arrays, hidden_in=hidden_TD, chosen=chosen, **outputs)
    return out, None if chosen is None else chosen[:, batch.logit_rows].swapaxes(0, 1)


@contextmanager
def memory_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise MemoryLimitError(f"out of memory: {error}; lower max_len, max_batch_tokens or max_sequences") from None


def open_runner(
    checkpoint: Checkpoint,
    layout: CacheLayout,
    cache: str,
    weights: str,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NativeRunner:
    """The checkpoint's model, with its cache and linear layers as `load_model` says."""
    keep_rows()
    with memory_errors():
        model, body = load_model(checkpoint, layout, weights, cache=cache, threads=threads, progress=progress)
    return NativeRunner(model, layout, body)
