"""How large the cache is: page tables from the model's windows, pools from the memory there is."""

from __future__ import annotations

from collections.abc import Callable

from maestrale.batch import CacheLayout
from maestrale.config import ModelConfig
from maestrale.errors import MemoryLimitError, UsageError

PAGE_SIZE = 16  # tokens; a page's fill is wasted half on average, a table is walked by page
DEFAULT_CONTEXT = 32768  # where a model's folder does not say; the length Mistral 7B was trained to use


def make_layout(
    config: ModelConfig,
    *,
    max_len: int | None,
    max_chunk: int,
    max_sequences: int,
    element_bytes: int,
    budget: int,
    page_size: int = PAGE_SIZE,
) -> CacheLayout:
    """The largest cache that fits `budget` bytes and is of use to `max_sequences` sequences at once.

    max_len: tokens of one sequence, prompt and completion; None takes the model's context, or what fits of it.
    max_chunk: the most tokens of one sequence in a step. Raises MemoryLimitError where not one sequence of
    `max_len` fits, naming the length that does.
    """
    for name, value in (("max_len", max_len), ("max_batch_tokens", max_chunk), ("max_sequences", max_sequences)):
        if value is not None and not 0 < value < 1 << 31:
            raise UsageError(f"{name} = {value}: expected a whole number from 1 to {(1 << 31) - 1}")
    wanted = max_len or config.max_position_embeddings or DEFAULT_CONTEXT
    token_bytes = 2 * config.n_kv_heads * config.head_dim * element_bytes

    def rings(length: int) -> tuple[int, ...]:
        kept = (length if window is None else min(window + max_chunk - 1, length) for window in config.windows)
        return tuple(-(-tokens // page_size) for tokens in kept)

    page_bytes = [token_bytes * page_size * config.sliding_window.count(window) for window in config.windows]

    def sequence_bytes(length: int) -> int:
        return sum(ring * size for ring, size in zip(rings(length), page_bytes, strict=True))

    if sequence_bytes(wanted) > budget:
        fits = longest_fit(sequence_bytes, wanted, budget)
        if max_len is not None or fits < 1:
            raise MemoryLimitError(
                f"a cache for {wanted} tokens takes {sequence_bytes(wanted) / 2**20:,.0f} MiB, "
                f"{budget / 2**20:,.0f} MiB are to be had: the longest context that fits is {fits}"
            )
        wanted = fits
    one = sequence_bytes(wanted)
    return CacheLayout(
        page_size=page_size,
        max_len=wanted,
        max_chunk=max_chunk,
        windows=config.windows,
        rings=rings(wanted),
        pages=tuple(min(max_sequences * ring, ring * budget // one) for ring in rings(wanted)),
    )


def longest_fit(sequence_bytes: Callable[[int], int], limit: int, budget: int) -> int:
    """The greatest length up to `limit` whose `sequence_bytes(length)` is within `budget`; 0 if none is."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sequence_bytes(middle) <= budget else (low, middle - 1)
    return low
