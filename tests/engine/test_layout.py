"""How large the cache is, counted once more by hand."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import DENSE

from maestrale.engine.layout import make_layout
from maestrale.errors import MemoryLimitError, UsageError

ELEMENT = 2


def layer_bytes(config, tokens):
    return 2 * tokens * config.n_kv_heads * config.head_dim * ELEMENT


def kept_tokens(window, max_len, max_chunk, page_size):
    """What a sequence's ring in one layer must hold, in whole pages."""
    tokens = max_len if window is None else min(max_len, window + max_chunk - 1)
    return math.ceil(tokens / page_size) * page_size


@given(
    windows=st.lists(st.none() | st.integers(1, 50), min_size=1, max_size=4),
    max_len=st.none() | st.integers(1, 200),
    context=st.none() | st.integers(1, 300),
    max_chunk=st.integers(1, 40),
    max_sequences=st.integers(1, 9),
    page_size=st.integers(1, 16),
    budget=st.integers(0, 4_000_000),
)
def test_the_largest_cache_that_fits_and_is_of_use(
    windows, max_len, context, max_chunk, max_sequences, page_size, budget
):
    config = replace(DENSE, n_layers=len(windows), sliding_window=tuple(windows), max_position_embeddings=context)
    wanted = max_len or context or 32768

    def one(length):
        return sum(layer_bytes(config, kept_tokens(w, length, max_chunk, page_size)) for w in windows)

    asked = {"max_chunk": max_chunk, "max_sequences": max_sequences, "element_bytes": ELEMENT, "page_size": page_size}
    if one(max_len or 1) > budget:
        with pytest.raises(MemoryLimitError, match="the longest context that fits is") as error:
            make_layout(config, max_len=max_len, budget=budget, **asked)
        fits = int(str(error.value).split()[-1])
        assert fits < wanted
        assert fits == 0 or one(fits) <= budget
        assert one(fits + 1) > budget
        return
    layout = make_layout(config, max_len=max_len, budget=budget, **asked)
    assert layout.windows == config.windows
    assert one(layout.max_len) <= budget
    assert layout.max_len == wanted or (max_len is None and one(layout.max_len + 1) > budget)
    for window, ring in zip(layout.windows, layout.rings, strict=True):
        assert ring * page_size == kept_tokens(window, layout.max_len, max_chunk, page_size)
    pools = list(zip(layout.windows, layout.pages, strict=True))
    page = layer_bytes(config, page_size)
    assert sum(windows.count(w) * pages * page for w, pages in pools) <= budget
    for (_, pages), ring in zip(pools, layout.rings, strict=True):
        assert ring <= pages <= max_sequences * ring
        assert pages == max_sequences * ring or (pages + 1) / ring > budget / one(layout.max_len)  # none is left over


@pytest.mark.parametrize("name", ["max_len", "max_chunk", "max_sequences"])
@pytest.mark.parametrize("value", [0, -1, 1 << 31])
def test_sizes_that_are_none_are_refused_by_their_public_name(name, value):
    asked = {"max_len": 8, "max_chunk": 8, "max_sequences": 8, "element_bytes": 2, "budget": 1 << 30} | {name: value}
    with pytest.raises(UsageError, match=rf"{name.replace('max_chunk', 'max_batch_tokens')} = {value}: expected"):
        make_layout(DENSE, **asked)


def test_a_windowed_cache_of_a_long_context_is_8_times_smaller():
    # Mistral 7B v0.1: W = 4096, a context of 32k. The ring also holds the chunk that is being written.
    config = replace(DENSE, n_layers=1, sliding_window=(4096,), max_position_embeddings=32768)
    asked = {"max_len": None, "max_sequences": 1, "element_bytes": 2, "budget": 1 << 40}
    assert make_layout(config, max_chunk=1, **asked).rings == (4096 // 16,)
    assert make_layout(replace(config, sliding_window=(None,)), max_chunk=1, **asked).rings == (32768 // 16,)
    assert make_layout(config, max_chunk=512, **asked).rings == ((4096 + 511 + 15) // 16,)
