"""The backends that these tests run on, each as the engine sees it."""

import math
from pathlib import Path

from maestrale.batch import CacheLayout
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.engine.engine import Engine
from maestrale.text.tokenizer import Tokenizer

BACKENDS = ["torch"]


def open_engine(
    folder: Path,
    backend: str,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "F32",
    page_size: int = 4,
    max_len: int = 128,
    max_chunk: int = 128,
    pages: int | None = None,
    max_sequences: int = 16,
) -> Engine:
    """An engine on a cache of exactly `pages` pages for each kind of layer; None is enough for all."""
    if backend == "torch":
        from maestrale.torch_backend.runner import open_runner
    with open_checkpoint(folder) as checkpoint:
        windows = checkpoint.config.windows
        kept = [max_len if w is None else min(max_len, w + max_chunk - 1) for w in windows]
        rings = tuple(math.ceil(tokens / page_size) for tokens in kept)
        pools = tuple(pages or max_sequences * ring for ring in rings)
        layout = CacheLayout(page_size, max_len, max_chunk, windows, rings, pools)
        runner = open_runner(checkpoint, layout, dtype, "cpu", lambda done, total: None)
        return Engine(runner, checkpoint.config.vocab_size, tokenizer, max_sequences)


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    free = engine.pages.available
    assert free == list(engine.pages.layout.pages), "pages are missing at the end"
