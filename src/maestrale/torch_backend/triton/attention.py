"""Attention that walks page tables itself: one kernel for chunks and decodes, and a second pass that joins splits.

A tile is some consecutive queries of one sequence; its rows are those queries times the query heads of one kv head, so
a key is read once for all heads that share it. Keys outside of the tile's window, or after its last query, are never
visited. A decode is a tile of one query whose keys are divided over several programs, each leaving its sum, peak and
weight; `_join` adds those up in order (Dao et al., "Flash-Decoding", 2023; the running softmax: Milakov and Gimelshein,
arXiv 1805.02867).

The two laws of batch.py stand here once more, in the kernel's language: `slots` in `slot`, `visible` in `_attend`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from maestrale.torch_backend.triton.ahead import LAUNCH, begin, wait
from maestrale.torch_backend.triton.dot import dot
from maestrale.torch_backend.triton.tiles import Tiles

_LOG2E = 1 / math.log(2)  # the GPU's own exponential is of base 2


@triton.jit
def slot(tables, sequence, positions, ring, mask, PAGE: tl.constexpr):
    """The cache law of batch.py: where the keys of these positions lie."""
    page = tl.load(tables + sequence * ring + positions // PAGE % ring, mask=mask, other=0)
    return page.to(tl.int64) * PAGE + positions % PAGE


@triton.jit
def _attend(
    q, k, v, y, sums, peaks, weights,
    tiles, positions, tables,
    ring, scale, n_splits, q_stride,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head, split). HEADS, WIDTH: H / G and C, rounded up to a power of two; scale has log2(e) in it.

    WINDOW: 0 where there is none. A row that sees nothing (a padded sequence, at position -1) gives zeros.
    """
    begin()
    wait()
    tile, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, count = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    at = tl.arange(0, QUERIES * HEADS)
    row, head, c = first + at // HEADS, at % HEADS, tl.arange(0, WIDTH)
    real = (at // HEADS < count) & (head < H // G)
    query = tl.load(positions + row, mask=real, other=-1)
    head = g * (H // G) + head
    oldest = tl.load(positions + first)
    low = tl.maximum(oldest - (WINDOW - 1), 0) if WINDOW else oldest * 0
    high = tl.where(oldest < 0, low, oldest + count)
    if SPLIT:
        each = tl.cdiv(tl.cdiv(high - low, KEYS), n_splits) * KEYS
        low = tl.minimum(low + split * each, high)
        high = tl.minimum(low + each, high)

    at_q = row.to(tl.int64)[:, None] * q_stride + head[:, None] * C + c[None, :]
    q_MC = tl.load(q + at_q, mask=real[:, None] & (c < C)[None, :], other=0.0)
    peak = tl.full([QUERIES * HEADS], -float("inf"), tl.float32)
    weight = tl.zeros([QUERIES * HEADS], tl.float32)
    sum_MC = tl.zeros([QUERIES * HEADS, WIDTH], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        kept = key < high
        where = slot(tables, sequence, key, ring, kept, PAGE)
        at_k = (where * G + g)[:, None] * C + c[None, :]
        # What is not stored is not read: an unwritten slot may hold NaN, and 0 * NaN is NaN.
        there = kept[:, None] & (c < C)[None, :]
        k_SC = tl.load(k + at_k, mask=there, other=0.0).to(q_MC.dtype)
        v_SC = tl.load(v + at_k, mask=there, other=0.0).to(q_MC.dtype)
        scores = dot(q_MC, tl.trans(k_SC)) * scale  # N6
        seen = kept[None, :] & (key[None, :] <= query[:, None])  # N9: `visible` of batch.py
        if WINDOW:
            seen = seen & (key[None, :] > query[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        p_MS = tl.exp2(scores - level[:, None])  # N7
        shrink = tl.exp2(peak - level)
        weight = weight * shrink + tl.sum(p_MS, 1)
        sum_MC = sum_MC * shrink[:, None] + dot(p_MS.to(q_MC.dtype), v_SC)
        peak = higher
    if SPLIT:
        part = (row * H + head).to(tl.int64) * n_splits + split
        tl.store(peaks + part, peak, mask=real)
        tl.store(weights + part, weight, mask=real)
        tl.store(sums + part[:, None] * C + c[None, :], sum_MC, mask=real[:, None] & (c < C)[None, :])
    else:
        mean = sum_MC / tl.where(weight > 0, weight, 1.0)[:, None]
        at_y = (row * H + head).to(tl.int64)[:, None] * C + c[None, :]
        tl.store(y + at_y, mean.to(y.dtype.element_ty), mask=real[:, None] & (c < C)[None, :])


@triton.jit
def _join(
    sums, peaks, weights, y, tiles, n_splits,
    H: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (tile of one row, head): the splits of one query's head become its output."""
    begin()
    wait()
    row, head = tl.load(tiles + tl.program_id(0) * 3 + 1), tl.program_id(1)
    s, c = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    part = (row * H + head).to(tl.int64) * n_splits + s
    peak = tl.load(peaks + part, mask=s < n_splits, other=-float("inf"))
    weight = tl.load(weights + part, mask=s < n_splits, other=0.0)
    sum_SC = tl.load(sums + part[:, None] * C + c[None, :], mask=(s < n_splits)[:, None] & (c < C)[None, :], other=0.0)
    top = tl.max(peak, 0)
    share = tl.exp2(peak - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight * share, 0)
    mean = tl.sum(sum_SC * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(y + (row * H + head).to(tl.int64) * C + c, mean.to(y.dtype.element_ty), mask=c < C)


def attend(
    q_THC: torch.Tensor,
    k_SGC: torch.Tensor,
    v_SGC: torch.Tensor,
    positions_T: torch.Tensor,
    table_BR: torch.Tensor,
    tiles: Tiles,
    page_size: int,
    window: int | None,
) -> torch.Tensor:
    """As ops/reference.py, over pages: y_THC in q's dtype.

    q_THC: its rows may lie apart (a slice of q, k and v together), its heads not. k_SGC, v_SGC: one layer's cache, in
    q's dtype or fp8. positions_T: int32, -1 in padding. table_BR: int32 page numbers. page_size: a power of two.
    """
    (T, H, C), G = q_THC.shape, k_SGC.shape[1]
    heads, width = triton.next_power_of_2(H // G), max(16, triton.next_power_of_2(C))
    y_THC = torch.empty((T, H, C), dtype=q_THC.dtype, device=q_THC.device)
    scale = C**-0.5 * _LOG2E
    wide, fp8 = q_THC.element_size() > 2 or width > 128, k_SGC.element_size() == 1
    for part, splits, queries in (
        (tiles.chunks, 1, tiles.queries),
        (tiles.decodes, tiles.splits, max(1, 16 // heads)),
    ):
        if not len(part):
            continue
        many = queries * heads > 64
        keys = (16 if width > 32 else 32) if wide else 128 if many and not fp8 else 64  # as many as fit the registers
        parts = T * H * splits if splits > 1 else 1
        sums = torch.empty((parts, C), dtype=torch.float32, device=q_THC.device)
        peaks, weights = torch.empty((2, parts), dtype=torch.float32, device=q_THC.device)
        _attend[(len(part), G, splits)](
            q_THC, k_SGC, v_SGC, y_THC, sums, peaks, weights, part, positions_T, table_BR,
            table_BR.shape[1], scale, splits, q_THC.stride(0),
            H=H, G=G, C=C, PAGE=page_size, WINDOW=window or 0, HEADS=heads, QUERIES=queries, KEYS=keys,
            WIDTH=width, SPLIT=splits > 1, num_warps=8 if many else 4, num_stages=2, **LAUNCH,
        )  # fmt: skip
        if splits > 1:
            _join[(len(part), H)](
                sums, peaks, weights, y_THC, part, splits,
                H=H, C=C, WIDTH=width, SPLITS=triton.next_power_of_2(splits), **LAUNCH,
            )  # fmt: skip
    return y_THC
