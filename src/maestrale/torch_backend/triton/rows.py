"""What is done to rows between the products: RMSNorm with the residual, RoPE with the cache's write, SiLU's product.

Each reads and writes its rows once. Values are rounded where torch's own operations would round them, so that the two
ways agree to the last bit but for the order of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from maestrale.torch_backend.triton.ahead import LAUNCH, begin, wait
from maestrale.torch_backend.triton.attention import slot
from maestrale.torch_backend.triton.dot import INTERPRETED


@triton.jit
def _norm(x, added, weight, sums, y, D, eps, ADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Program: a row. N3: in fp32, rounded, then the weight."""
    begin()
    wait()
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    value = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(added + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
        tl.store(sums + row * D + d, value.to(x.dtype.element_ty), mask=d < D)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    normed = normed.to(x.dtype.element_ty).to(tl.float32) * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + row * D + d, normed.to(x.dtype.element_ty), mask=d < D)


@triton.jit
def kept(x, pool):
    """As the pool keeps it: torch_backend/cache.py's rule for fp8."""
    if pool.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if INTERPRETED:  # it cuts off where a GPU rounds: x is rounded first, by a sum whose last place is fp8's
            exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)
            large = (((exponent + 20) << 23) | (1 << 22)).to(tl.float32, bitcast=True)
            x = (x + large) - large
    return x.to(pool.dtype.element_ty)


@triton.jit
def _turn_and_keep(
    qkv, k_pool, v_pool, cos, sin, positions, sequences, tables, ring,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (row, heads) of q, k and v together. q is turned in place; k, turned, and v go to the cache (N4)."""
    begin()
    wait()
    t = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + t)
    if position >= 0:  # padding is written nowhere
        where = slot(tables, tl.load(sequences + t), position, ring, True, PAGE)
        head, j = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
        here = j < C // 2
        c, s = (
            tl.load(cos + t * (C // 2) + j, mask=here, other=0.0),
            tl.load(sin + t * (C // 2) + j, mask=here, other=0.0),
        )
        at = qkv + t * (H + 2 * G) * C + head[:, None] * C + 2 * j[None, :]
        turned = (head < H + G)[:, None] & here[None, :]
        a = tl.load(at, mask=turned, other=0.0).to(tl.float32)
        b = tl.load(at + 1, mask=turned, other=0.0).to(tl.float32)
        real = (a * c[None, :] - b * s[None, :]).to(qkv.dtype.element_ty)
        imaginary = (a * s[None, :] + b * c[None, :]).to(qkv.dtype.element_ty)
        is_q = turned & (head < H)[:, None]
        tl.store(at, real, mask=is_q)
        tl.store(at + 1, imaginary, mask=is_q)
        is_k = turned & (head >= H)[:, None]
        to_k = k_pool + (where * G + (head - H)[:, None]) * C + 2 * j[None, :]
        tl.store(to_k, kept(real, k_pool), mask=is_k)
        tl.store(to_k + 1, kept(imaginary, k_pool), mask=is_k)
        is_v = ((head >= H + G) & (head < H + 2 * G))[:, None] & here[None, :]
        to_v = v_pool + (where * G + (head - H - G)[:, None]) * C + 2 * j[None, :]
        tl.store(to_v, kept(tl.load(at, mask=is_v, other=0.0), v_pool), mask=is_v)
        tl.store(to_v + 1, kept(tl.load(at + 1, mask=is_v, other=0.0), v_pool), mask=is_v)


@triton.jit
def _silu_product(both, y, F, WIDTH: tl.constexpr):
    """Program (row, outputs): silu of the row's first half times its second."""
    begin()
    wait()
    t, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    one = tl.load(both + t * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    three = tl.load(both + t * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    silu = (one / (1 + tl.exp(-one))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + t * F + f, (silu * three).to(y.dtype.element_ty), mask=f < F)


def norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, added_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + added, the RMSNorm of that): x itself where nothing is added."""
    T, D = x_TD.shape
    y_TD = torch.empty_like(x_TD)
    sums_TD = x_TD if added_TD is None else torch.empty_like(x_TD)
    if T:
        width = triton.next_power_of_2(D)
        _norm[(T,)](
            x_TD, x_TD if added_TD is None else added_TD, weight_D, sums_TD, y_TD, D, eps,
            ADDED=added_TD is not None, WIDTH=width, num_warps=8 if width > 2048 else 4,
            **LAUNCH,
        )  # fmt: skip
    return sums_TD, y_TD


def turn_and_keep(
    qkv: torch.Tensor,
    k_SGC: torch.Tensor,
    v_SGC: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    positions_T: torch.Tensor,
    sequences_T: torch.Tensor,
    table_BR: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """qkv [T, (H + 2 G) C] → q_THC, a view of it, turned; k and v are written to the cache's slots of their positions.

    cos_TP, sin_TP: fp32 [T, P]. positions_T, sequences_T, table_BR: int32; a row at position -1 is left out.
    """
    (_, G, C), (T, width) = k_SGC.shape, qkv.shape
    H = width // C - 2 * G
    heads = min(16, triton.next_power_of_2(H + 2 * G))
    _turn_and_keep[(T, triton.cdiv(H + 2 * G, heads))](
        qkv, k_SGC, v_SGC, cos_TP, sin_TP, positions_T, sequences_T, table_BR, table_BR.shape[1],
        H=H, G=G, C=C, PAGE=page_size, HEADS=heads, HALF=triton.next_power_of_2(C // 2),
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return qkv[:, : H * C].unflatten(-1, (H, C))


def silu_product(both_TF: torch.Tensor) -> torch.Tensor:
    """[T, 2 F], w1's outputs before w3's → silu(w1 x) * (w3 x), [T, F]."""
    T, F = both_TF.shape[0], both_TF.shape[1] // 2
    y_TF = both_TF.new_empty(T, F)
    width = min(1024, triton.next_power_of_2(F))
    _silu_product[(T, triton.cdiv(F, width))](both_TF, y_TF, F, WIDTH=width, **LAUNCH)
    return y_TF
