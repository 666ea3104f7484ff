"""Attention over pages against the reference over the same cache, and against its formula where a ring has wrapped."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from maestrale.batch import Batch, CacheLayout
from maestrale.config import ModelConfig
from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.ops import reference
from maestrale.torch_backend.triton.attention import attend
from maestrale.torch_backend.triton.tiles import Tiles, deal, n_splits

PAGE = 16
ERROR = {torch.float32: 1e-5, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}


def problem(seed, dtype, heads, kv_heads, head_dim, window, sequences):
    """(cache, batch, q_THC): each of `sequences` is (new tokens, last position); other slots hold NaN."""
    rng, make = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    longest, chunk = max(last for _, last in sequences) + 1, max(count for count, _ in sequences)
    kept = longest if window is None else min(longest, window + chunk - 1)
    ring = -(-kept // PAGE)
    config = ModelConfig(heads * head_dim, 1, head_dim, 8, heads, kv_heads, 8, 1e-5, 1e4, (window,))
    layout = CacheLayout(PAGE, longest, chunk, (window,), (ring,), (ring * len(sequences) + 3,))
    cache = PagedCache(config, layout, dtype, torch.device("cpu"), reference.attend)
    cache.pools[0].fill_(math.nan)
    table = rng.permutation(layout.pages[0])[: ring * len(sequences)].reshape(-1, ring)
    for b, (count, last) in enumerate(sequences):
        oldest = 0 if window is None else max(0, last - count + 1 - window + 1)
        for position in range(oldest, last + 1):
            slot = table[b, position // PAGE % ring] * PAGE + position % PAGE
            cache.pools[0][:, 0, slot] = torch.randn(2, kv_heads, head_dim, generator=make).to(dtype)
    positions = np.concatenate([np.arange(last - count + 1, last + 1) for count, last in sequences])
    starts = np.cumsum([0, *(count for count, _ in sequences)])
    none = np.empty((0, 2), np.int64)
    batch = Batch(positions, positions, starts, (table,), (none,), np.arange(len(positions)))
    return cache, batch, torch.randn(len(positions), heads, head_dim, generator=make).to(dtype)


def compare(cache, batch, q, device):
    expected = reference.attend(q, *cache.pools[0][:, 0], cache.begin(batch).groups[0])
    k, v = cache.pools[0][:, 0].to(device)
    (_, H, _), G = q.shape, k.shape[1]
    got = attend(
        q.to(device),
        k,
        v,
        torch.from_numpy(batch.positions).int().to(device),
        torch.from_numpy(batch.tables[0]).int().to(device),
        deal(batch.starts, H, G, device),
        PAGE,
        cache.layout.windows[0],
    ).cpu()
    assert got.dtype == q.dtype
    error = ERROR[q.dtype]
    torch.testing.assert_close(got.float(), expected.float(), atol=error, rtol=error)


MIXED = [(1, 0), (7, 30), (1, 40), (1, 63)]
WRAPPED = [(1, 200), (9, 130), (1, 4), (20, 19)]
CASES = {
    "one head each": (torch.float32, 2, 2, 8, None, MIXED),
    "four heads share a kv head": (torch.float32, 4, 1, 16, None, MIXED),
    "eight heads share one, in a ring": (torch.float32, 8, 1, 4, 20, WRAPPED),
    "three heads share one, odd width": (torch.float32, 6, 2, 20, 7, WRAPPED),
    "a window of one": (torch.float32, 2, 1, 8, 1, WRAPPED),
    "a window of pages": (torch.float32, 2, 2, 8, 32, WRAPPED),
    "half precision": (torch.float16, 4, 2, 12, 33, WRAPPED),
    "bfloat16": (torch.bfloat16, 4, 2, 12, None, MIXED),
    "decodes alone": (torch.float32, 4, 2, 8, None, [(1, 150), (1, 0), (1, 15), (1, 16), (1, 17)]),
    "a chunk of several tiles": (torch.float32, 8, 2, 8, 50, [(70, 170)]),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_over_pages_gives_the_references_answer(name, device):
    compare(*problem(len(name), *CASES[name]), device)


@pytest.mark.parametrize("seed", range(6))
def test_attention_over_pages_gives_the_references_answer_in_random_ragged_batches(seed, device):
    rng = np.random.default_rng(seed)
    window, kv_heads = [None, int(rng.integers(1, 40))][seed % 2], int(rng.integers(1, 3))
    shape = (kv_heads * int(rng.integers(1, 9)), kv_heads, 2 * int(rng.integers(1, 20)))
    sequences = [
        (int(count), int(count) - 1 + int(rng.integers(0, 120))) for count in rng.choice([1, 1, 1, 2, 5, 33], 4)
    ]
    compare(*problem(seed, torch.float32, *shape, window, sequences), device)


def test_a_padded_sequence_gives_zeros_and_touches_nobody(device):
    cache, batch, q = problem(3, torch.float32, 4, 2, 8, None, [(1, 40), (1, 9)])
    positions, table = torch.tensor([40, 9, -1, -1]), torch.from_numpy(batch.tables[0])
    every = torch.arange(4, dtype=torch.int32)
    decodes = torch.stack([every, every, torch.ones_like(every)], 1)
    y = attend(
        torch.cat([q, q]).to(device),
        *cache.pools[0][:, 0].to(device),
        positions.int().to(device),
        torch.cat([table, table * 0]).int().to(device),
        Tiles(decodes[:0].to(device), decodes.to(device), 1, n_splits(4, 2)),
        PAGE,
        None,
    ).cpu()
    expected = reference.attend(q, *cache.pools[0][:, 0], cache.begin(batch).groups[0])
    torch.testing.assert_close(y[:2], expected, atol=1e-5, rtol=1e-5)
    assert not y[2:].any()


def test_tiles_hold_each_row_once():
    starts = np.array([0, 1, 70, 71, 73])
    tiles = deal(starts, 32, 8, torch.device("cpu"))
    rows = [
        (b, row)
        for b, first, count in torch.cat([tiles.chunks, tiles.decodes]).tolist()
        for row in range(first, first + count)
    ]
    assert sorted(rows) == [(b, row) for b in range(4) for row in range(starts[b], starts[b + 1])]
    assert tiles.queries == 32  # of four heads each: 128 rows
    assert tiles.chunks[:, 2].max() <= 32
