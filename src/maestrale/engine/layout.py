"""How large the cache is: page tables from the model's windows, pools from the memory there is."""

from __future__ import annotations

from collections.abc import Callable

from maestrale.batch import CacheLayout
from maestrale.config import DEFAULT_CONTEXT, ModelConfig
from maestrale.errors import MemoryLimitError, UsageError
from maestrale.values import MAX_SIZE

PAGE_SIZE = 16  # tokens; a page's fill is wasted half on average, a table is walked by page


def make_layout(
    config: ModelConfig,
    *,
    max_len: int | None,
    max_chunk: int,
    max_sequences: int,
    element_bytes: float,
    budget: int,
    page_size: int = PAGE_SIZE,
) -> CacheLayout:
    """The largest cache that fits `budget` bytes and is of use to `max_sequences` sequences at once.

    max_len: tokens of one sequence, prompt and completion; None takes the model's context, or what fits of it.
    max_chunk: the most tokens of one sequence in a step. element_bytes: of a number in the cache, scales counted in;
    what a position of a head takes must be whole. Raises MemoryLimitError where not one sequence of
    `max_len` fits, naming the length that does.
    """
    for name, value in (("max_len", max_len), ("max_batch_tokens", max_chunk), ("max_sequences", max_sequences)):
        if value is not None and not 0 < value <= MAX_SIZE:
            raise UsageError(f"{name} = {value}: expected a whole number from 1 to {MAX_SIZE}")
    wanted = max_len or config.max_position_embeddings or DEFAULT_CONTEXT

    def size(length: int) -> int:
        return sequence_bytes(config, length, max_chunk, element_bytes, page_size)

    if size(wanted) > budget:
        fits = longest_fit(size, wanted, budget)
        if max_len is not None or fits < 1:
            raise MemoryLimitError(
                f"a cache for {wanted} tokens takes {size(wanted) / 2**20:,.0f} MiB, "
                f"{budget / 2**20:,.0f} MiB are to be had: the longest context that fits is {fits}"
            )
        wanted = fits
    one, rings = size(wanted), page_rings(config, wanted, max_chunk, page_size)
    return CacheLayout(
        page_size=page_size,
        max_len=wanted,
        max_chunk=max_chunk,
        windows=config.windows,
        rings=rings,
        pages=tuple(min(max_sequences * ring, ring * budget // one) for ring in rings),
    )


def page_rings(config: ModelConfig, length: int, max_chunk: int, page_size: int) -> tuple[int, ...]:
    """Entries of a page table for each kind of layer: a window and the chunk that comes into it, or all of `length`."""
    kept = (length if window is None else min(window + max_chunk - 1, length) for window in config.windows)
    return tuple(-(-tokens // page_size) for tokens in kept)


def sequence_bytes(
    config: ModelConfig, length: int, max_chunk: int, element_bytes: float, page_size: int = PAGE_SIZE
) -> int:
    """What the pages of one sequence of `length` tokens take."""
    page_bytes = 2 * config.n_kv_heads * round(config.head_dim * element_bytes) * page_size
    rings = page_rings(config, length, max_chunk, page_size)
    layers = (config.sliding_window.count(window) for window in config.windows)
    return page_bytes * sum(ring * count for ring, count in zip(rings, layers, strict=True))


def longest_fit(size: Callable[[int], int], limit: int, budget: int) -> int:
    """The greatest length up to `limit` whose `size(length)` is within `budget`; 0 if none is."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle - 1)
    return low
