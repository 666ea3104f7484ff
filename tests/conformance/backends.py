"""The backends that these tests run on, each as the engine sees it."""

import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from maestrale.batch import CacheLayout, Runner
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.engine.engine import Engine
from maestrale.native_backend import kernels
from maestrale.text.tokenizer import Tokenizer

NATIVE = pytest.param("native", marks=pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing())))
BACKENDS = ["torch", NATIVE]
AHEAD = "torch, drawing"  # as on a GPU: it draws tokens, and the next step is begun before they are read


def open_engine(
    folder: Path,
    backend: str,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "F32",
    weights: str | None = None,
    page_size: int = 4,
    max_len: int = 128,
    max_chunk: int = 128,
    pages: int | None = None,
    max_sequences: int = 16,
) -> Engine:
    """An engine on a cache of exactly `pages` pages for each kind of layer; None is enough for all. weights: of the
    native backend's linear layers; None is `dtype`. Every page holds NaN at first: what a sequence has not written
    there itself must not reach it."""
    with open_checkpoint(folder) as checkpoint:
        windows = checkpoint.config.windows
        kept = [max_len if w is None else min(max_len, w + max_chunk - 1) for w in windows]
        rings = tuple(math.ceil(tokens / page_size) for tokens in kept)
        pools = tuple(pages or max_sequences * ring for ring in rings)
        layout = CacheLayout(page_size, max_len, max_chunk, windows, rings, pools)
        runner: Runner
        if backend in ("torch", AHEAD):
            from maestrale.torch_backend.runner import open_runner as open_torch

            runner = open_torch(checkpoint, layout, dtype, "cpu", lambda done, total: None)
            runner.draws = backend == AHEAD
            for pool in runner.cache.pools:
                pool.fill_(math.nan)
        else:
            from maestrale.native_backend.runner import open_runner as open_native

            form = {"F32": "f32", "BF16": "bf16"}[dtype]
            with mock.patch.object(np, "empty", side_effect=of_ones):
                runner = open_native(checkpoint, layout, form, weights or form, 2)
        return Engine(runner, checkpoint.config.vocab_size, tokenizer, max_sequences)


def of_ones(*args, empty=np.empty, **kwargs) -> np.ndarray:
    """np.empty, but all bits are 1: NaN in every format of the cache."""
    array = empty(*args, **kwargs)
    array.reshape(-1).view(np.uint8).fill(0xFF)
    return array


def run(engine: Engine) -> None:
    """All that is asked of it. Raises what a request failed of."""
    while engine.has_work:
        requests = [*engine.scheduler.waiting, *engine.scheduler.running]
        engine.step()
        for request in requests:
            if request.error is not None:
                raise request.error
    free = engine.pages.available
    assert free == list(engine.pages.layout.pages), "pages are missing at the end"
