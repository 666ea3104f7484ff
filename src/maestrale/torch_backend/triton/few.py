"""Products of a few rows, as decoding has them: each weight is read once, wide, and multiplied where it arrives.

A program has some outputs and all of their inputs. What stands between two products is done in the same kernel: the
RMSNorm of what is read (each program does it again: 8 KB beside its 32 KB of weights), SiLU's product, RoPE with the
cache's write, or the residual. The first weights are asked for before the kernel before has ended (ahead.py). Values
are rounded where the model of record rounds them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from maestrale.torch_backend.triton.ahead import LAUNCH, begin
from maestrale.torch_backend.triton.attention import slot
from maestrale.torch_backend.triton.dot import INTERPRETED
from maestrale.torch_backend.triton.experts import gated
from maestrale.torch_backend.triton.few_sums import any_sums, fetch_words
from maestrale.torch_backend.triton.packed import PackedLinear
from maestrale.torch_backend.triton.rows import kept, norm

FEW = 4  # rows; more are better off in a matrix unit
Weight = torch.Tensor | PackedLinear
_UNIT = 0x3F800000  # the bits of 1.0
_OUT = 4  # of a program of whole weights: up to 32 KB of them at once
# Registers of a thread: so four programs share a multiprocessor, and 128 KB of weights are under way.
_SLIM = {} if INTERPRETED.value else {"maxnreg": 128}


@triton.jit
def _row_of(sums, r: tl.constexpr, ROWS: tl.constexpr):
    """Column r of [OUT, ROWS]."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == r)[None, :], sums, 0.0), 1)


@triton.jit
def _put_turned(
    value, q, k_pool, v_pool, cos, sin, positions, sequences, tables, ring, r, T, first,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Outputs first … of row r of q, k and v together: q turned to its row, k, turned, and v to the cache (N4)."""
    there = tl.minimum(r, T - 1)
    position = tl.where(r < T, tl.load(positions + there), -1)
    where = slot(tables, tl.load(sequences + there), tl.maximum(position, 0), ring, True, PAGE)
    n = first + 2 * tl.arange(0, OUT // 2)
    head, j = n // C, n % C // 2
    a, b = tl.split(tl.reshape(value, [OUT // 2, 2]))
    heads = tl.where(r < T, H + 2 * G, 0)
    turned = head < tl.minimum(heads, H + G)
    c = tl.load(cos + r * (C // 2) + j, mask=turned, other=1.0)
    s = tl.load(sin + r * (C // 2) + j, mask=turned, other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    one, two = (x * c - y * s).to(value.dtype), (x * s + y * c).to(value.dtype)
    is_q = head < tl.minimum(heads, H)
    tl.store(q + r * H * C + n, one, mask=is_q)
    tl.store(q + r * H * C + n + 1, two, mask=is_q)
    heads = tl.where(position >= 0, heads, 0)  # padding is written nowhere
    is_k, is_v = (head >= H) & (head < tl.minimum(heads, H + G)), (head >= H + G) & (head < heads)
    to_k = k_pool + (where * G + head - H) * C + 2 * j
    tl.store(to_k, kept(one, k_pool), mask=is_k)
    tl.store(to_k + 1, kept(two, k_pool), mask=is_k)
    to_v = v_pool + (where * G + head - H - G) * C + 2 * j
    tl.store(to_v, kept(a, v_pool), mask=is_v)
    tl.store(to_v + 1, kept(b, v_pool), mask=is_v)


@triton.jit
def _few_product(
    x, gain, data, scales, offsets, residual, y, T, N, K, n_words, n_groups, eps, unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ONCE: tl.constexpr,
    NORMED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Program (OUT outputs, ROWS rows): y [T, N] = x w^T, or of x's RMSNorm; added to the residual."""
    begin()
    n, first = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.program_id(1) * ROWS
    sums = any_sums(
        x + first * K, gain, data, scales, offsets, n, n < N, T - first, N, K, n_words, n_groups, eps, unit,
        BITS, GROUP, AFFINE, FP8, ROWS, OUT, IN, ONCE, NORMED,
    )  # fmt: skip
    for r in tl.static_range(ROWS):
        real, at = n < tl.where(first + r < T, N, 0), (first + r) * N + n
        value = _row_of(sums, r, ROWS).to(x.dtype.element_ty)
        if ADDED:
            value = (tl.load(residual + at, mask=real, other=0.0).to(tl.float32) + value.to(tl.float32)).to(value.dtype)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=real)


@triton.jit
def _few_gated(
    x, gain, data, scales, offsets, h, T, F, K, n_words, n_groups, eps, unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ONCE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Likewise h [T, F] = silu(x w1^T) * (x w3^T); w1 lies before w3. Of whole weights a program has OUT / 2."""
    begin()
    first = tl.program_id(1) * ROWS
    if BITS and not FP8:
        f = tl.program_id(0) * OUT + tl.arange(0, OUT)
        fetch_words(data, F + f, n_words, OUT, 2 * IN * (GROUP * BITS // 32))
        one = any_sums(
            x + first * K, gain, data, scales, offsets, f, f < F, T - first, 2 * F, K, n_words, n_groups, eps, unit,
            BITS, GROUP, AFFINE, FP8, ROWS, OUT, IN, ONCE, NORMED,
        )  # fmt: skip
        three = any_sums(
            x + first * K, gain, data, scales, offsets, F + f, f < F, T - first, 2 * F, K, n_words, n_groups, eps, unit,
            BITS, GROUP, AFFINE, FP8, ROWS, OUT, IN, ONCE, NORMED,
        )  # fmt: skip
        value = gated(_row_of(one, 0, ROWS), _row_of(three, 0, ROWS), h.dtype.element_ty)
        tl.store(h + first * F + f, value, mask=f < F)
    else:
        i, f = tl.arange(0, OUT), tl.program_id(0) * (OUT // 2) + tl.arange(0, OUT // 2)
        own = tl.program_id(0) * (OUT // 2) + i // 2
        sums = any_sums(
            x + first * K, gain, data, scales, offsets, own + i % 2 * F, own < F, T - first, 2 * F, K, n_words,
            n_groups, eps, unit, BITS, GROUP, AFFINE, FP8, ROWS, OUT, IN, ONCE, NORMED,
        )  # fmt: skip
        for r in tl.static_range(ROWS):
            one, three = tl.split(tl.reshape(_row_of(sums, r, ROWS), [OUT // 2, 2]))
            value = gated(one, three, h.dtype.element_ty)
            tl.store(h + (first + r) * F + f, value, mask=f < tl.where(first + r < T, F, 0))


@triton.jit
def _few_turned(
    x, gain, data, scales, offsets, T, K, n_words, n_groups, eps, unit,
    q, k_pool, v_pool, cos, sin, positions, sequences, tables, ring,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ONCE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Likewise q, k and v together: q [T, H C] turned, k, turned, and v to the cache."""
    begin()
    N: tl.constexpr = (H + 2 * G) * C
    n, first = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.program_id(1) * ROWS
    sums = any_sums(
        x + first * K, gain, data, scales, offsets, n, n < N, T - first, N, K, n_words, n_groups, eps, unit,
        BITS, GROUP, AFFINE, FP8, ROWS, OUT, IN, ONCE, NORMED,
    )  # fmt: skip
    for r in tl.static_range(ROWS):
        _put_turned(
            _row_of(sums, r, ROWS).to(x.dtype.element_ty), q, k_pool, v_pool, cos, sin, positions, sequences, tables,
            ring, first + r, T, tl.program_id(0) * OUT, H, G, C, PAGE, OUT,
        )  # fmt: skip


def fits(x_TD: torch.Tensor, *weights: object) -> bool:
    """Whether these kernels are for so many rows and such weights."""
    return 0 < len(x_TD) <= FEW and all(isinstance(weight, torch.Tensor | PackedLinear) for weight in weights)


def product(
    x_TK: torch.Tensor,
    weight: Weight,
    gain_K: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_TN: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """residual + x w^T, [T, N], in x's dtype, or told in another. gain_K: of x's RMSNorm, which is multiplied then."""
    (T, K), (N, _) = x_TK.shape, _shape(weight)
    y_TN = torch.empty((T, N), dtype=dtype or x_TK.dtype, device=x_TK.device)
    x_TK, parts, shape = _prepared(x_TK, weight, gain_K, eps)
    _few_product[_grid(N, T, shape)](
        x_TK, *parts[:4], y_TN if residual_TN is None else residual_TN, y_TN, T, N, K, *parts[4:], eps, _UNIT,
        ADDED=residual_TN is not None, **shape, **LAUNCH,
    )  # fmt: skip
    return y_TN


def gated_product(x_TK: torch.Tensor, w13: Weight, gain_K: torch.Tensor, eps: float) -> torch.Tensor:
    """silu(w1 x) * w3 x of x's RMSNorm, [T, F]; w1's outputs lie before w3's."""
    (T, K), F = x_TK.shape, _shape(w13)[0] // 2
    h_TF = x_TK.new_empty(T, F)
    x_TK, parts, shape = _prepared(x_TK, w13, gain_K, eps)
    own = shape["OUT"] if shape["BITS"] and not shape["FP8"] else shape["OUT"] // 2
    _few_gated[_grid(F, T, shape | {"OUT": own})](
        x_TK, *parts[:4], h_TF, T, F, K, *parts[4:], eps, _UNIT, **shape, **LAUNCH
    )
    return h_TF


def turned_product(
    x_TK: torch.Tensor,
    wqkv: Weight,
    gain_K: torch.Tensor,
    eps: float,
    k_SGC: torch.Tensor,
    v_SGC: torch.Tensor,
    cos_TC: torch.Tensor,
    sin_TC: torch.Tensor,
    positions_T: torch.Tensor,
    sequences_T: torch.Tensor,
    table_BR: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """q_THC of x's RMSNorm, turned; k and v are written to the cache. The rest as rows.turn_and_keep."""
    (T, K), (_, G, C) = x_TK.shape, k_SGC.shape
    H = _shape(wqkv)[0] // C - 2 * G
    q_THC = x_TK.new_empty(T, H, C)
    x_TK, parts, shape = _prepared(x_TK, wqkv, gain_K, eps)
    _few_turned[_grid((H + 2 * G) * C, T, shape)](
        x_TK, *parts[:4], T, K, *parts[4:], eps, _UNIT, q_THC, k_SGC, v_SGC, cos_TC, sin_TC, positions_T, sequences_T,
        table_BR, table_BR.shape[1], H=H, G=G, C=C, PAGE=page_size, **shape, **LAUNCH,
    )  # fmt: skip
    return q_THC


def _shape(weight: Weight) -> tuple[int, int]:
    if isinstance(weight, PackedLinear):
        return weight.out_features, weight.in_features
    return weight.shape[0], weight.shape[1]


def _grid(outputs: int, rows: int, shape: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(outputs, shape["OUT"]), triton.cdiv(rows, shape["ROWS"])


def _prepared(
    x_TK: torch.Tensor, weight: Weight, gain_K: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """x, where its RMSNorm is not left to the kernel after that; (gain, data, scales, offsets, n_words, n_groups); the
    kernel's constants."""
    T, K = x_TK.shape
    once, rows = K * x_TK.element_size() <= 8192, triton.next_power_of_2(T) if isinstance(weight, torch.Tensor) else 1
    width = triton.next_power_of_2(K) if once else 4096 // x_TK.element_size()
    whole = {"ROWS": rows, "OUT": _OUT, "IN": width, "ONCE": once, "NORMED": gain_K is not None}
    whole |= {"num_warps": 4, **_SLIM} if rows == 1 else {"num_warps": 8}
    if isinstance(weight, torch.Tensor):
        form = {"BITS": 0, "GROUP": 0, "AFFINE": False, "FP8": False}
        return x_TK, (weight if gain_K is None else gain_K, weight, weight, weight, 0, 0), form | whole
    scales, offsets = weight.scales, weight.scales if weight.offsets is None else weight.offsets
    parts = (scales if gain_K is None else gain_K, weight.data, scales, offsets, *weight.extents)
    if weight.format == "fp8":
        return x_TK, parts, weight.constants | whole
    if gain_K is not None:
        x_TK = norm(x_TK, gain_K, eps)[1]
    group = weight.group or 32
    groups = min(64, triton.next_power_of_2(triton.cdiv(K, group)))
    words = {"GROUP": group, "ROWS": 1, "OUT": 16, "IN": groups, "ONCE": False, "NORMED": False, "num_warps": 8}
    return x_TK, parts, weight.constants | words
