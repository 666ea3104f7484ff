"""What few.py's kernels multiply: a program's outputs of a weight of any form times a few rows, added up in fp32.

Plain weights and fp8 lie row by row. The words of int8 and int4 (packed.py has their layout) are multiplied group by
group of inputs. An int4 code is not converted: set into the mantissa of a float between 1 and 2, it is that float less
1; the ones are taken off a group's sum at its end, with the middle of the codes. That costs some bits of fp32: a sum is
off by 1e-4 of the largest, a thirtieth of a rounding to bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maestrale.torch_backend.triton.ahead import fetch, wait


@triton.jit
def _squares(x, k, K):
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    return value * value


@triton.jit
def _times(
    w_NK, x, gain, k, factor, T, K, ROWS: tl.constexpr, OUT: tl.constexpr, NORMED: tl.constexpr
):  # fmt: skip
    """[OUT, ROWS]: the weights of inputs k times x, whose rows' RMSNorm takes these factors."""
    t = tl.arange(0, ROWS)
    sums = tl.zeros([OUT, ROWS], tl.float32)
    for r in tl.static_range(ROWS):
        inputs = tl.where(r < T, K, 0)  # a row that is not there has none
        value = tl.load(x + r * K + k, mask=k < inputs, other=0.0)
        if NORMED:  # N3
            value = (value.to(tl.float32) * tl.sum(tl.where(t == r, factor, 0.0), 0)).to(value.dtype)
            scale = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            value = (value.to(tl.float32) * scale).to(value.dtype)
        part = tl.sum(w_NK.to(tl.float32) * value.to(tl.float32)[None, :], 1)
        sums += tl.where((t == r)[None, :], part[:, None], 0.0)
    return sums


@triton.jit
def whole_sums(
    x, gain, w, row, real, T, K, eps,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ONCE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """[OUT, ROWS] in fp32: rows of w [rows, K], if real, times x [T, K] or its RMSNorm. Waits. ONCE: IN is all of K."""
    k, t = tl.arange(0, IN), tl.arange(0, ROWS)
    at_w = w + row.to(tl.int64)[:, None] * K + k[None, :]
    w_NK = tl.load(at_w, mask=real[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    wait()
    factor = tl.zeros([ROWS], tl.float32)
    if NORMED:
        for r in tl.static_range(ROWS):
            inputs = tl.where(r < T, K, 0)
            squares = _squares(x + r * K, k, inputs)
            if not ONCE:
                for start in range(IN, K, IN):
                    squares += _squares(x + r * K, start + k, inputs)
            factor = tl.where(t == r, tl.rsqrt(tl.sum(squares, 0) / K + eps), factor)
    if ONCE:
        return _times(w_NK, x, gain, k, factor, T, K, ROWS, OUT, NORMED)
    else:
        sums = tl.zeros([OUT, ROWS], tl.float32)
        for start in range(0, K, IN):
            there = real[:, None] & (k < K - start - IN)[None, :]
            w_next = tl.load(at_w + start + IN, mask=there, other=0.0, eviction_policy="evict_first")
            sums += _times(w_NK, x, gain, start + k, factor, T, K, ROWS, OUT, NORMED)
            w_NK = w_next
        return sums


@triton.jit
def _set(word, unit, AT: tl.constexpr, TO: tl.constexpr):
    """1 + 2^(TO - 23) times the code that stands at bit AT. Two places in use halve the shifts.
    unit: the bits of 1.0, not a constant: two constants do not fit the one instruction that this is."""
    if AT > TO:
        word = word >> (AT - TO)
    elif AT < TO:
        word = word << (TO - AT)
    return ((word & (15 << TO)) | unit).to(tl.float32, bitcast=True)


@triton.jit
def word_sums(
    x, data, scales, offsets, n, N, K, n_words, n_groups, unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """[OUT] in fp32: a packed weight's outputs n, less than N, times the row x [K]."""
    PER: tl.constexpr = 32 // BITS
    g, block, lane = tl.arange(0, GROUPS), (n // 16).to(tl.int64), n % 16
    sums = tl.zeros([GROUPS, OUT], tl.float32)
    for start in range(0, n_words, GROUPS * (GROUP // PER)):
        high = tl.zeros([GROUPS, OUT], tl.float32)
        low = tl.zeros([GROUPS, OUT], tl.float32)
        x_high = tl.zeros([GROUPS], tl.float32)
        x_low = tl.zeros([GROUPS], tl.float32)
        for j in tl.static_range(GROUP // PER):
            at = start + g * (GROUP // PER) + j
            there = (at < n_words)[:, None] & (n < N)[None, :]
            word = tl.load(
                data + (block[None, :] * n_words + at[:, None]) * 16 + lane[None, :],
                mask=there, other=0, eviction_policy="evict_first",
            )  # fmt: skip
            for i in tl.static_range(PER):
                real_x = at < n_words if BITS == 4 else at * PER + i < K  # int8's last word may be padded
                value = tl.load(x + at * PER + i, mask=real_x, other=0.0).to(tl.float32)
                if BITS == 8:
                    high += ((word << (24 - 8 * i)) >> 24).to(tl.float32) * value[:, None]
                elif i >= 4 and i < 7:
                    low += _set(word, unit, i % 4 * 8 + 4, 12) * value[:, None]
                    x_low += value
                else:
                    high += _set(word, unit, i % 4 * 8 + i // 4 * 4, 16) * value[:, None]
                    x_high += value
        if BITS == 8:
            sums += high
        else:
            group = start // (GROUP // PER) + g
            here = (group < n_groups)[:, None] & (n < N)[None, :]
            at_group = (block[None, :] * n_groups + group[:, None]) * 16 + lane[None, :]
            scale = tl.load(scales + at_group, mask=here, other=0.0).to(tl.float32)
            codes = (high - x_high[:, None]) * 128.0 + (low - x_low[:, None]) * 2048.0
            if AFFINE:
                offset = tl.load(offsets + at_group, mask=here, other=0.0)
                sums += codes * scale + offset * (x_high + x_low)[:, None]
            else:
                sums += (codes - 8.0 * (x_high + x_low)[:, None]) * scale
    whole = tl.sum(sums, 0)
    if BITS == 8:  # a scale for each output
        whole *= tl.load(scales + n, mask=n < N, other=0.0)
    return whole


@triton.jit
def fetch_words(data, n, n_words, OUT: tl.constexpr, WORDS: tl.constexpr):
    """Asks for the first words of a block of 16 outputs; two of each output lie in a line."""
    tl.static_assert(OUT == 16)
    block = (tl.min(n, 0) // 16).to(tl.int64)
    fetch(data + (block * n_words + tl.minimum(2 * tl.arange(0, WORDS // 2), n_words - 1)) * 16)


@triton.jit
def any_sums(
    x, gain, data, scales, offsets, row, real, T, N, K, n_words, n_groups, eps, unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ONCE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """[OUT, ROWS] in fp32: the outputs `row` of a weight with N of them, if real, times x [T, K]. BITS: 0 of a plain
    weight. IN: inputs at a time, of words groups of them; those have one row, and no RMSNorm."""
    if BITS and not FP8:
        tl.static_assert(ROWS == 1 and not NORMED)
        fetch_words(data, row, n_words, OUT, 2 * IN * (GROUP * BITS // 32))
        wait()
        sums = word_sums(
            x, data, scales, offsets, row, N, K, n_words, n_groups, unit, BITS, GROUP, AFFINE, OUT, IN
        )[:, None]  # fmt: skip
    else:
        sums = whole_sums(x, gain, data, row, real, T, K, eps, ROWS, OUT, IN, ONCE, NORMED)
        if FP8:
            sums *= tl.load(scales + row, mask=real, other=0.0)[:, None]
    return sums
