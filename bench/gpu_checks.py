"""Each Triton kernel against the operations it stands for, on fresh random inputs: name → (largest error, allowed)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from gpu_inputs import decode_batch, random_model
from torch import nn
from torch.nn.functional import linear, silu

from maestrale.batch import Batch, CacheLayout
from maestrale.checkpoint.packed import dequantize, pack_int4, pack_int8
from maestrale.checkpoint.rounding import int4_codes, int8_codes
from maestrale.config import ModelConfig, MoeConfig
from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.model import FeedForward, RMSNorm, rope, rope_turns
from maestrale.torch_backend.moe import MixtureOfExperts
from maestrale.torch_backend.ops import reference
from maestrale.torch_backend.ops.groups import FP8, gather
from maestrale.torch_backend.runner import TorchRunner
from maestrale.torch_backend.triton.attention import attend
from maestrale.torch_backend.triton.experts import experts, group
from maestrale.torch_backend.triton.few import Weight, gated_product, product
from maestrale.torch_backend.triton.packed import PackedLinear, from_packed, to_fp8
from maestrale.torch_backend.triton.packed_experts import PackedStack
from maestrale.torch_backend.triton.rows import norm, silu_product, turn_and_keep
from maestrale.torch_backend.triton.runner import TritonRunner
from maestrale.torch_backend.triton.tiles import deal

Result = tuple[float, float]


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _allowed(dtype: torch.dtype) -> float:
    """Of a row's largest value: some roundings."""
    return 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4


def _attention(
    sequences: list[tuple[int, int]], window: int | None, fp8: bool = False
) -> Callable[[torch.device, bool], Result]:
    """sequences: (new tokens, last position) of each."""

    def check(device: torch.device, tiny: bool) -> Result:
        H, G, C = (4, 2, 16) if tiny else (32, 8, 128)
        ours = [(min(n, 9), min(last, 60)) if tiny else (n, last) for n, last in sequences]
        longest, chunk = max(last for _, last in ours) + 1, max(n for n, _ in ours)
        kept = longest if window is None else min(longest, window + chunk - 1)
        ring = -(-kept // 16)
        config = ModelConfig(H * C, 1, C, 8, H, G, 8, 1e-5, 1e4, (window,))
        layout = CacheLayout(16, longest, chunk, (window,), (ring,), (ring * len(ours),))
        cache = PagedCache(config, layout, _dtype(device), device, reference.attend, fp8)
        cache.pools[0].copy_(torch.randn(cache.pools[0].shape, device=device))
        table = np.random.default_rng().permutation(layout.pages[0]).reshape(-1, ring)
        positions = np.concatenate([np.arange(last - n + 1, last + 1) for n, last in ours])
        starts = np.cumsum([0, *(n for n, _ in ours)])
        none = np.empty((0, 2), np.int64)
        batch = Batch(positions, positions, starts, (table,), (none,), np.arange(len(positions)))
        q = torch.randn(len(positions), H, C, dtype=_dtype(device), device=device)
        k, v = cache.pools[0][:, 0]
        expected = reference.attend(q, k, v, cache.begin(batch).groups[0])
        positions_T, table_BR = (torch.from_numpy(array.astype(np.int32)).to(device) for array in (positions, table))
        got = attend(q, k, v, positions_T, table_BR, deal(starts, H, G, device), 16, window)
        return error(got, expected), _allowed(q.dtype)

    return check


def _experts(n_tokens: int, packed: bool = False) -> Callable[[torch.device, bool], Result]:
    def check(device: torch.device, tiny: bool) -> Result:
        D, F = (64, 32) if tiny else (1024, 3584)
        parts = [FeedForward(D, F) for _ in range(8)]
        layer = MixtureOfExperts(D, 2, parts).to(device, _dtype(device)).requires_grad_(False)
        x = torch.randn(min(n_tokens, 12) if tiny else n_tokens, D, dtype=_dtype(device), device=device)
        if packed:
            up, down = [_int4(linear) for e in parts for linear in (e.w1, e.w3)], [_int4(e.w2) for e in parts]
            grouped = group(layer.gate(x), 2)
            return error(experts(x, PackedStack(up), PackedStack(down), grouped), layer(x)), _allowed(x.dtype)
        w13 = torch.stack([torch.stack([e.w1.weight, e.w3.weight]) for e in parts])
        w2 = torch.stack([e.w2.weight for e in parts])
        return error(experts(x, w13, w2, group(layer.gate(x), 2)), layer(x)), _allowed(x.dtype)

    return check


def _int4(layer: nn.Linear) -> PackedLinear:
    """The layer's weight in int4; it is left with what that stands for."""
    weight = layer.weight
    packed = pack_int4(*int4_codes(weight.float().cpu().numpy(), 32))
    weight.copy_(torch.from_numpy(dequantize(packed)))
    return from_packed(packed, weight.device, weight.dtype)


def _norm(device: torch.device, tiny: bool) -> Result:
    width = 96 if tiny else 4096
    layer = RMSNorm(width, 1e-5).to(device, _dtype(device)).requires_grad_(False)
    x, added = torch.randn(2, 5, width, dtype=_dtype(device), device=device)
    sums, y = norm(x, layer.weight, 1e-5, added)
    return max(error(sums, x + added), error(y, layer(x + added))), _allowed(x.dtype)


def _rope(device: torch.device, tiny: bool, fp8: bool = False) -> Result:
    H, G, C, T = 4, 2, 16, 7
    dtype = _dtype(device)
    qkv = torch.randn(T, (H + 2 * G) * C, dtype=dtype, device=device)
    k, v = torch.zeros(2, 32, G, C, dtype=FP8 if fp8 else dtype, device=device)
    positions = torch.arange(9, 9 + T, dtype=torch.int32, device=device)
    turns = rope_turns(positions, C, 1e4)
    q_and_k = rope(qkv[:, : (H + G) * C].unflatten(1, (-1, C)), turns)
    value = qkv[:, (H + G) * C :].unflatten(1, (-1, C)).clone()
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    cos, sin = turns.real.contiguous(), turns.imag.contiguous()
    q = turn_and_keep(qkv, k, v, cos, sin, positions, positions * 0, table, 16)
    slots = torch.where(positions < 16, positions + 16, positions - 16)
    off = max(error(gather(pool, slots, dtype), x) for pool, x in ((k, q_and_k[:, H:]), (v, value)))
    # fp8: half a step of its three bits; by rounding in another order a step.
    return max(error(q, q_and_k[:, :H]) / _allowed(dtype), off / (2**-3 if fp8 else _allowed(dtype))), 1.0


def _silu(device: torch.device, tiny: bool) -> Result:
    both = torch.randn(5, 200, dtype=_dtype(device), device=device)
    return error(silu_product(both), silu(both[:, :100]) * both[:, 100:]), _allowed(both.dtype)


def _packed(format: str, rows: int) -> Callable[[torch.device, bool], Result]:
    def check(device: torch.device, tiny: bool) -> Result:
        n, k = (48, 128) if tiny else (4096, 4096)
        values = np.random.default_rng().standard_normal((n, k), np.float32) * np.float32(k**-0.5)
        x = torch.randn(rows, k, dtype=_dtype(device), device=device)
        if format == "fp8":
            layer = to_fp8(torch.from_numpy(values).to(device))
            unpacked = layer.weight.to(x.dtype)
        else:
            packed = pack_int8(*int8_codes(values)) if format == "int8" else pack_int4(*int4_codes(values, 32))
            layer = from_packed(packed, device, x.dtype)
            unpacked = torch.from_numpy(dequantize(packed)).to(device, x.dtype)
        return error(layer(x), linear(x, unpacked)), _allowed(x.dtype)

    return check


def _few(form: str, rows: int) -> Callable[[torch.device, bool], Result]:
    """Products of a few rows: after RMSNorm and onto a residual, and gated."""

    def check(device: torch.device, tiny: bool) -> Result:
        n, k = (96, 128) if tiny else (4096, 14336) if rows == 1 else (28672, 4096)
        dtype = _dtype(device)
        if form == "whole":
            values = torch.randn(n, k, dtype=dtype, device=device) * k**-0.5
            weight: Weight = values
        else:
            plain = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
            packed = to_fp8(plain.weight) if form == "fp8" else _int4(plain)
            weight, values = packed, packed.unpack(dtype)
        layer = RMSNorm(k, 1e-5).to(device, dtype).requires_grad_(False)
        layer.weight.copy_(torch.rand(k) + 0.5)
        x = torch.randn(rows, k, dtype=dtype, device=device)
        residual = torch.randn(rows, n, dtype=dtype, device=device)
        off = error(product(x, weight, layer.weight, 1e-5, residual), residual + linear(layer(x), values))
        both = linear(layer(x), values)
        gated = error(gated_product(x, weight, layer.weight, 1e-5), silu(both[:, : n // 2]) * both[:, n // 2 :])
        return max(off, gated), _allowed(dtype) if device.type == "cuda" else 1e-3

    return check


def _step(size: int, experts: bool = False) -> Callable[[torch.device, bool], Result]:
    """Two layers of a whole decode, captured and replayed several times, against torch's operations; of a mixture in
    fp32, where no rounding makes a router choose another expert."""

    def check(device: torch.device, tiny: bool) -> Result:
        widths = (64, 2, 16, 96, 4, 2, 128) if tiny else (4096, 2, 128, 14336, 32, 8, 32000)
        config = ModelConfig(*widths, 1e-5, 1e6, (None,) * 2, moe=MoeConfig(4, 2) if experts else None)
        count, last = (min(size, 3), 20) if tiny else (size, 700)
        ring = last // 16 + 1
        layout = CacheLayout(16, last + 1, 8, (None,), (ring,), (ring * count,))
        dtype = torch.float32 if experts else _dtype(device)
        model = random_model(config, dtype, device)
        plain = TorchRunner(model, layout)
        plain.cache.pools[0].normal_()
        batch = replace(decode_batch(config, layout, count, last), draws=None)
        expected = torch.from_numpy(np.array(plain.step(batch).logits))
        ours = TritonRunner(model, layout)
        ours.cache.pools[0].copy_(plain.cache.pools[0])
        got = [torch.from_numpy(np.array(ours.step(batch).logits)) for _ in range(1 if tiny else 20)]
        return max(error(logits, expected) for logits in got), 2**-5 if dtype == torch.bfloat16 else 1e-3

    return check


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference beside the largest value of its row: a row of small values is held to them. NaN is inf."""
    got, expected = got.float().flatten(1), expected.float().flatten(1)
    off = ((got - expected).abs().amax(1) / expected.abs().amax(1)).max().item()
    return off if math.isfinite(off) else math.inf


CHECKS: dict[str, Callable[[torch.device, bool], Result]] = {
    "attention, decodes": _attention([(1, 3000), (1, 0), (1, 17), (1, 999)], None),
    "attention, decodes in a ring": _attention([(1, 3000), (1, 40), (1, 700)], 48),
    "attention, ragged chunks": _attention([(200, 900), (1, 1000), (33, 32), (5, 77)], None),
    "attention, ragged chunks in a ring": _attention([(200, 900), (1, 1000), (33, 32), (5, 77)], 48),
    "attention, decodes, fp8 cache": _attention([(1, 3000), (1, 0), (1, 17), (1, 999)], None, fp8=True),
    "attention, ragged chunks, fp8 cache": _attention([(200, 900), (1, 1000), (5, 77)], None, fp8=True),
    "experts, 1 token": _experts(1),
    "experts, 64 tokens": _experts(64),
    "experts, 2,000 tokens": _experts(2000),
    "experts in int4, 1 token": _experts(1, packed=True),
    "experts in int4, 64 tokens": _experts(64, packed=True),
    "experts in int4, 2,000 tokens": _experts(2000, packed=True),
    **{
        f"{form} product, {rows} of a few rows": _few(form, rows)
        for form in ("whole", "fp8", "int4")
        for rows in (1, 4)
    },
    **{f"a whole step, {size} decodes": _step(size) for size in (1, 4, 64)},
    "a whole step of a mixture, 1 decode": _step(1, experts=True),
    "a whole step of a mixture, 64 decodes": _step(64, experts=True),
    "norm with residual": _norm,
    "rope and cache write": _rope,
    "rope and fp8 cache write": partial(_rope, fp8=True),
    "SiLU's product": _silu,
    **{
        f"{format} product, {rows} rows": _packed(format, rows)
        for format in ("int4", "int8", "fp8")
        for rows in (1, 64, 65)
    },
}
