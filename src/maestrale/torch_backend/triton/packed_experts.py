"""The grouped experts' two products with int8, int4 or fp8 weights: experts.py's tiles, packed.py's sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from maestrale.torch_backend.triton.ahead import LAUNCH, begin, wait
from maestrale.torch_backend.triton.experts import gated, n_tiles, tile_of, weighed
from maestrale.torch_backend.triton.packed import PackedLinear, laid_together, packed_sums

_ROWS, _OUT = 64, 32  # of a tile, at most; outputs of a program


@triton.jit
def _up_packed(
    x, data, scales, offsets, each_data, each_scale, n_words, n_groups, h, tokens, counts, E, D, F,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FP8: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """As _up of experts.py; an expert's w1 lies before its w3."""
    begin()
    wait()
    expert, first, last = tile_of(counts, E, EXPERTS, ROWS)
    if expert < E:
        pair, f = first + tl.arange(0, ROWS), tl.program_id(0) * OUT + tl.arange(0, OUT)
        at_x = x + tl.load(tokens + pair, mask=pair < last, other=0).to(tl.int64) * D
        one_at, scale_at = expert.to(tl.int64) * 2 * each_data, expert.to(tl.int64) * 2 * each_scale
        one = packed_sums(
            at_x, pair < last, data + one_at, scales + scale_at, offsets + scale_at, f, F, D, n_words, n_groups,
            BITS, GROUP, AFFINE, FP8, ROWS, OUT, WORDS,
        )  # fmt: skip
        one_at, scale_at = one_at + each_data, scale_at + each_scale
        three = packed_sums(
            at_x, pair < last, data + one_at, scales + scale_at, offsets + scale_at, f, F, D, n_words, n_groups,
            BITS, GROUP, AFFINE, FP8, ROWS, OUT, WORDS,
        )  # fmt: skip
        at_h = h + pair.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(at_h, gated(one, three, h.dtype.element_ty), mask=(pair < last)[:, None] & (f < F)[None, :])


@triton.jit
def _down_packed(
    h, data, scales, offsets, each_data, each_scale, n_words, n_groups, y, weights, counts, E, D, F,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FP8: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """As _down of experts.py."""
    begin()
    wait()
    expert, first, last = tile_of(counts, E, EXPERTS, ROWS)
    if expert < E:
        pair, d = first + tl.arange(0, ROWS), tl.program_id(0) * OUT + tl.arange(0, OUT)
        at, scale_at = expert.to(tl.int64) * each_data, expert.to(tl.int64) * each_scale
        sums = packed_sums(
            h + pair.to(tl.int64) * F, pair < last, data + at, scales + scale_at, offsets + scale_at, d, D, F,
            n_words, n_groups, BITS, GROUP, AFFINE, FP8, ROWS, OUT, WORDS,
        )  # fmt: skip
        part = weighed(sums, tl.load(weights + pair, mask=pair < last, other=0.0), y.dtype.element_ty)
        at_y = y + pair.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at_y, part, mask=(pair < last)[:, None] & (d < D)[None, :])


class PackedStack:
    """Weights of one shape and format one after the other: of each expert w1 and w3, or w2. The layers' own parts
    become views of it; they must be alike."""

    def __init__(self, layers: Sequence[PackedLinear]):
        self._first, self._count = layers[0], len(layers)
        data, scales, offsets = laid_together(layers)
        each = data.numel() // len(layers), scales.numel() // len(layers)
        self._parts = (data, scales, scales if offsets is None else offsets, *each, *self._first.extents)

    def up(self, x_TD: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, rows: int) -> torch.Tensor:
        """silu(x w1^T) * (x w3^T) of each pair. rows: pairs that an expert may well have."""
        F, D, E, rows = self._first.out_features, self._first.in_features, self._count // 2, min(rows, _ROWS)
        h = x_TD.new_empty(len(tokens), F)
        grid = (triton.cdiv(F, _OUT), n_tiles(len(tokens), E, rows))
        _up_packed[grid](x_TD, *self._parts, h, tokens, counts, E, D, F, **self._constants(E, rows))
        return h

    def down(self, h: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, rows: int) -> torch.Tensor:
        """The router's weight times h w2^T of each pair."""
        D, F, E, rows = self._first.out_features, self._first.in_features, self._count, min(rows, _ROWS)
        y_pairs = h.new_empty(len(weights), D)
        grid = (triton.cdiv(D, _OUT), n_tiles(len(weights), E, rows))
        _down_packed[grid](h, *self._parts, y_pairs, weights, counts, E, D, F, **self._constants(E, rows))
        return y_pairs

    def _constants(self, n_experts: int, rows: int) -> dict[str, Any]:
        tile = {"EXPERTS": max(2, triton.next_power_of_2(n_experts)), "ROWS": rows, "OUT": _OUT, "WORDS": 32}
        return self._first.constants | tile | {"num_warps": 8, "num_stages": 3} | LAUNCH
