"""Attention over pages against its formula in double precision: windows, wraps, chunks, any grouping of heads."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestrale.batch import visible
from maestrale.checkpoint.dtypes import StoredTensor, cast
from maestrale.native_backend import kernels

native = kernels.native


def rounded(x):
    """Each number as the nearest bf16."""
    return cast(cast(StoredTensor.from_array(x, "F32"), "BF16"), "F32").array


def in_codes(x):
    """Each head's entries as int8 codes, to nearest, times their scale: what an int8 cache keeps of them."""
    most = np.abs(x).max(axis=-1, keepdims=True)
    return np.rint(x * (np.float32(127) / most)).astype(np.float64) * (most / np.float32(127)).astype(np.float64)


KEPT = {"f32": lambda x: x, "bf16": rounded, "int8": in_codes}


def turns_of(positions, speeds, head_dim):
    """[T][2][padded]: what the kernels read, from the angles."""
    padded = -(-head_dim // 16) * 16
    turns = np.zeros((len(positions), 2, padded), np.float32)
    angles = np.repeat(np.outer(positions, speeds), 2, axis=1)
    turns[:, 0, :head_dim], turns[:, 1, :head_dim] = np.cos(angles), np.sin(angles)
    turns[:, 1, :head_dim:2] *= -1
    return turns


def turned(x_THC, positions, speeds):
    """Pairs (2j, 2j + 1) as complex numbers, turned (N4)."""
    pairs = x_THC[..., ::2].astype(np.complex128) + 1j * x_THC[..., 1::2]
    pairs *= np.exp(1j * np.outer(positions, speeds))[:, None]
    out = np.empty(x_THC.shape)
    out[..., ::2], out[..., 1::2] = pairs.real, pairs.imag
    return out


class Cache:
    """Sequences that grow step by step in pages of one pool, and all their rows so far for the formula."""

    def __init__(self, n_kv_heads, group, head_dim, window, page_size, max_chunk, cache, sequences, max_len, seed=0):
        self.G, self.H, self.C, self.window, self.cache = n_kv_heads, n_kv_heads * group, head_dim, window, cache
        self.page_size, self.draw = page_size, np.random.default_rng(seed)
        kept = max_len if window is None else window + max_chunk - 1
        ring = -(-kept // page_size)
        self.tables = self.draw.permutation(sequences * ring + 3)[: sequences * ring].reshape(sequences, ring)
        size = (sequences * ring + 3) * native.page_bytes(n_kv_heads, head_dim, page_size, cache)
        self.pool = np.full(size, 0xFF, np.uint8)  # NaN wherever nothing was written, as bf16 and as float
        self.speeds = np.float32(100.0) ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        self.rows = [
            [np.zeros((0, h, head_dim), np.float32) for h in (self.H, self.G, self.G)] for _ in range(sequences)
        ]
        self.longest = max(1, 32 // group)

    def step(self, isa, counts, longest=None, rows=None):
        """Brings counts[b] new tokens to sequence b (those with none take no part); gives y_THC of the step."""
        taking = [b for b, n in enumerate(counts) if n]
        new = rows or [
            [self.draw.standard_normal((n, h, self.C), np.float32) for h in (self.H, self.G, self.G)]
            for n in counts
            if n
        ]
        before = [len(self.rows[b][0]) for b in taking]
        if rows is None and self.cache == "int8":
            for start, parts in zip(before, new, strict=True):
                self.keep_off_borders(parts[1], start)
        for b, parts in zip(taking, new, strict=True):
            self.rows[b] = [np.concatenate(pair) for pair in zip(self.rows[b], parts, strict=True)]
        positions = np.concatenate([np.arange(s, s + len(parts[0])) for s, parts in zip(before, new, strict=True)])
        q, k, v = (np.concatenate([parts[i] for parts in new]) for i in range(3))
        y = np.full_like(q, np.nan)
        starts = np.cumsum([0] + [len(parts[0]) for parts in new])
        native.attention(
            isa=isa, cache=self.cache, page_size=self.page_size, window=self.window, pool=self.pool,
            tables=np.ascontiguousarray(self.tables[taking]), positions=positions, starts=starts,
            turns=turns_of(positions, self.speeds, self.C), q=q, k=k, v=v, y=y, longest=longest or self.longest,
        )  # fmt: skip
        return y, [(b, s, len(parts[0])) for b, s, parts in zip(taking, before, new, strict=True)]

    def keep_off_borders(self, k_NGC, start):
        """Draws keys anew of which an entry, turned, lies so near the border of two codes that fp32 may take either."""
        while True:
            x = turned(k_NGC, np.arange(start, start + len(k_NGC)), self.speeds)
            codes = x * 127 / np.abs(x).max(axis=-1, keepdims=True)
            near = (np.abs(np.abs(codes - np.floor(codes)) - 0.5) < 1e-4).any(axis=-1)
            if not near.any():
                return
            k_NGC[near] = self.draw.standard_normal((near.sum(), self.C), np.float32)

    def formula(self, spans):
        """The same rows from the definition, in double precision, on what the cache can hold."""
        out = []
        for b, start, count in spans:
            q, k, v = self.rows[b]
            kept, where = KEPT[self.cache], np.arange(len(q))
            q, k = (turned(x, where, self.speeds).astype(np.float32) for x in (q, k))
            q = (q if self.cache == "f32" else rounded(q)).astype(np.float64)
            k, v = kept(k).astype(np.float64), kept(v).astype(np.float64)
            for p in range(start, start + count):
                seen = visible(p, where, self.window)
                for h in range(self.H):
                    g = h // (self.H // self.G)
                    scores = k[seen, g] @ q[p, h] / math.sqrt(self.C)
                    weights = np.exp(scores - scores.max())
                    out.append(weights @ v[seen, g] / weights.sum())
        return np.array(out).reshape(-1, self.H, self.C)


def check(y, expected, cache):
    # fp32: sums of a few hundred terms. Else the weights of the values are rounded once to bf16, to 2^-9 of each.
    assert np.abs(y - expected).max() < (3e-6 if cache == "f32" else 2**-8 * np.abs(expected).max() + 4e-3)


@st.composite
def caches(draw):
    window, cache = draw(st.none() | st.integers(1, 70)), draw(st.sampled_from(list(KEPT)))
    max_chunk = draw(st.integers(1, 60))
    return Cache(
        draw(st.integers(1, 3)), draw(st.integers(1, 8)), 2 * draw(st.integers(1, 40)), window,
        draw(st.sampled_from([16, 16, 1, 3, 24, 32])), max_chunk, cache, draw(st.integers(1, 3)), 240,
        seed=draw(st.integers(0, 1 << 20)),
    ), max_chunk  # fmt: skip


@settings(max_examples=60)
@given(caches(), st.data())
def test_every_query_gets_the_formulas_answer_however_its_sequence_came(isa, made, data):
    cache, max_chunk = made
    for _ in range(data.draw(st.integers(1, 4))):
        lengths = [len(rows[0]) for rows in cache.rows]
        counts = [data.draw(st.integers(0, min(max_chunk, 240 - length))) for length in lengths]
        if any(counts):
            y, spans = cache.step(isa, counts)
            check(y, cache.formula(spans), cache.cache)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_usual_heads_over_a_long_past(isa, kept, head_dim, group):
    cache = Cache(2, group, head_dim, None, 16, 300, kept, 1, 400)
    for counts in ([300], [1], [37], [1]):
        y, spans = cache.step(isa, counts)
        check(y, cache.formula(spans), kept)


@settings(max_examples=40)
@given(caches(), st.data())
def test_a_querys_bits_do_not_depend_on_chunks_or_on_what_is_computed_beside_it(isa, made, data):
    cache, max_chunk = made
    length = data.draw(st.integers(1, 200))
    rows = [cache.draw.standard_normal((length, h, cache.C), np.float32) for h in (cache.H, cache.G, cache.G)]
    found = []
    for _ in range(2):
        cache.pool[:] = 0xFF
        cache.rows = [[np.zeros((0, h, cache.C), np.float32) for h in (cache.H, cache.G, cache.G)] for _ in cache.rows]
        cache.tables = cache.draw.permutation(cache.tables.ravel()).reshape(cache.tables.shape)
        parts, done = [], 0
        while done < length:
            count = min(data.draw(st.integers(1, max_chunk)), length - done)
            beside = [data.draw(st.integers(0, 1)) for _ in cache.rows[1:]]
            others = [
                [cache.draw.standard_normal((n, h, cache.C), np.float32) for h in (cache.H, cache.G, cache.G)]
                for n in beside
                if n
            ]
            ours = [x[done : done + count] for x in rows]
            y, _ = cache.step(isa, [count, *beside], data.draw(st.integers(1, cache.longest)), [ours, *others])
            parts.append(y[:count])
            done += count
        found.append(np.concatenate(parts))
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("page_size", [4, 16, 40])
def test_what_others_left_in_a_page_is_not_seen_even_where_it_is_nan(isa, page_size):
    for kept in KEPT:
        cache = Cache(1, 1, 16, None, page_size, 40, kept, 1, 64)
        assert np.isnan(cache.pool.view(np.float32)).all()
        for count in (5, 1, 20):
            y, spans = cache.step(isa, [count])
            check(y, cache.formula(spans), kept)


@pytest.mark.parametrize("page_size", [4, 16, 40])
def test_nor_is_it_in_a_page_that_a_ring_takes_up_on_a_later_turn(isa, page_size):
    """As after a prefix found in the cache: of the ring's pages only those are there that the window still sees."""
    for kept in KEPT:
        cache = Cache(2, 2, 16, 8, page_size, 45, kept, 1, 256)
        tokens = cache.tables.shape[1] * page_size  # of a turn
        for _ in range(tokens // 4):
            cache.step(isa, [4])
        start = len(cache.rows[0][0])
        pages = cache.pool.reshape(cache.tables.size + 3, -1)
        seen = {int(cache.tables[0, p // page_size % cache.tables.shape[1]]) for p in range(start - 8, start)}
        for page in set(range(len(pages))) - seen:
            pages[page] = 0xFF
        for count in (3, 1, 40, 2, 33):
            y, spans = cache.step(isa, [count])
            check(y, cache.formula(spans), kept)


def test_very_large_scores_neither_overflow_nor_lose_the_largest(isa):
    cache = Cache(1, 1, 16, None, 16, 200, "f32", 1, 256)
    cache.speeds = np.zeros(8, np.float32)
    rows = [cache.draw.standard_normal((200, 1, 16), np.float32) for _ in range(3)]
    rows[0] *= 1e4
    y, spans = cache.step(isa, [200], rows=[rows])
    assert np.abs(y - cache.formula(spans)).max() < 1e-4
