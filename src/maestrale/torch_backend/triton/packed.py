"""Products with int8, int4 and fp8 weights: unpacked in registers for a few rows, and once for many.

int8 and int4 lie as checkpoint/packed.py defines them, seen as 32-bit words of 4 or 8 inputs: word [b, i, o] holds
inputs i * PER … of output 16 b + o. The k-th input of every word is one product of its own with every PER-th column of
x, so no value changes its place after it is loaded. fp8 lies row by row, with a scale for each output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn.functional import linear

from maestrale.checkpoint.packed import BLOCK, PackedWeight
from maestrale.checkpoint.packed_room import is_linear
from maestrale.torch_backend.ops.groups import FP8 as e4m3
from maestrale.torch_backend.triton.ahead import LAUNCH, begin, wait
from maestrale.torch_backend.triton.dot import dot

FEW = 64  # rows: above, unpacking costs less than reading the words again for each tile of rows
BITS = {"int8": 8, "int4": 4, "fp8": 8}


@triton.jit
def _value(word, scale, offset, i: tl.constexpr, BITS: tl.constexpr, AFFINE: tl.constexpr):
    """Input i of each word, as fp32: int8 without its scale, which belongs to the whole row."""
    if BITS == 8:
        return ((word << (24 - 8 * i)) >> 24).to(tl.float32)
    else:
        code = ((word >> (i % 4 * 8 + i // 4 * 4)) & 15).to(tl.float32)
        return code * scale + offset if AFFINE else (code - 8) * scale


@triton.jit
def packed_sums(
    at_x, real, data, scales, offsets, n, N, K, n_words, n_groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """[ROWS, OUT] in fp32: the rows of K numbers that begin at at_x, if real, times a weight's outputs n."""
    sums = tl.zeros([ROWS, OUT], tl.float32)
    if FP8:
        k = tl.arange(0, WORDS * 4)
        at_w = data + n.to(tl.int64)[None, :] * K + k[:, None]
        for start in range(0, K, WORDS * 4):
            inside = k < K - start
            x_TK = tl.load(at_x[:, None] + start + k[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            w_KN = tl.load(at_w + start, mask=inside[:, None] & (n < N)[None, :], other=0.0)
            sums += dot(x_TK, w_KN.to(x_TK.dtype))
    else:
        PER: tl.constexpr = 32 // BITS
        w, block, lane = tl.arange(0, WORDS), (n // 16).to(tl.int64), n % 16
        for start in range(0, n_words, WORDS):
            at = start + w
            there = (at < n_words)[:, None] & (n < N)[None, :]
            word = tl.load(data + (block[None, :] * n_words + at[:, None]) * 16 + lane[None, :], mask=there, other=0)
            scale, offset = 1.0, 0.0
            if BITS == 4:
                at_group = (block[None, :] * n_groups + (at * PER // GROUP)[:, None]) * 16 + lane[None, :]
                scale = tl.load(scales + at_group, mask=there, other=0.0).to(tl.float32)
                if AFFINE:
                    offset = tl.load(offsets + at_group, mask=there, other=0.0)
            for i in tl.static_range(PER):
                column = at * PER + i
                x_TW = tl.load(at_x[:, None] + column[None, :], mask=real[:, None] & (column < K)[None, :], other=0.0)
                sums += dot(x_TW, _value(word, scale, offset, i, BITS, AFFINE).to(x_TW.dtype))
    if BITS == 8:  # a scale for each output
        sums *= tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    return sums


@triton.jit
def _some_rows(
    x, data, scales, offsets, y, T, N, K, n_words, n_groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Program: OUT outputs of all rows."""
    begin()
    wait()
    n, t = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, ROWS)
    sums = packed_sums(
        x + t * K, t < T, data, scales, offsets, n, N, K, n_words, n_groups,
        BITS, GROUP, AFFINE, FP8, ROWS, OUT, WORDS,
    )  # fmt: skip
    tl.store(y + t[:, None] * N + n[None, :], sums.to(y.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def _unpack(
    words, scales, offsets, values, N, K, n_words, n_groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Program (16 outputs, WORDS words of each): values [N, K]."""
    PER: tl.constexpr = 32 // BITS
    block, lane = tl.program_id(0).to(tl.int64), tl.arange(0, 16)
    at, n = tl.program_id(1) * WORDS + tl.arange(0, WORDS), block * 16 + lane
    there = (at < n_words)[:, None] & (n < N)[None, :]
    word = tl.load(words + (block * n_words + at[:, None]) * 16 + lane[None, :], mask=there, other=0)
    offset = 0.0
    if BITS == 4:
        at_group = (block * n_groups + (at * PER // GROUP)[:, None]) * 16 + lane[None, :]
        scale = tl.load(scales + at_group, mask=there, other=0.0).to(tl.float32)
        if AFFINE:
            offset = tl.load(offsets + at_group, mask=there, other=0.0)
    else:
        scale = tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    for i in tl.static_range(PER):
        column = at * PER + i
        value = _value(word, scale, offset, i, BITS, AFFINE)
        if BITS == 8:
            value = value * scale
        to = values + n[None, :] * K + column[:, None]
        tl.store(to, value.to(values.dtype.element_ty), mask=(column < K)[:, None] & (n < N)[None, :])


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed; it computes in its input's dtype.

    format: int8, int4 or fp8. data: int32 words [N / 16, n_words, 16], or fp8 [N, K]. scales, offsets: as packed.py
    has them; of fp8, fp32 [N].
    """

    data: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None

    def __init__(
        self,
        format: str,
        shape: tuple[int, int],
        group: int,
        data: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.format, self.group, self.dtype = format, group, dtype
        self.out_features, self.in_features = shape
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TK = x.reshape(-1, self.in_features)
        y = self._few(x_TK) if len(x_TK) <= FEW else linear(x_TK, self.unpack(x.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K] in the model's dtype, made anew."""
        return self.unpack(self.dtype)

    def _few(self, x_TK: torch.Tensor) -> torch.Tensor:
        (T, K), N = x_TK.shape, self.out_features
        y_TN = x_TK.new_empty(T, N)
        rows, out = max(16, triton.next_power_of_2(T)), 16 if T <= 16 else 32
        grid = (triton.cdiv(N, out),)
        if T == 0:
            return y_TN
        _some_rows[grid](
            x_TK, self.data, self.scales, self.scales if self.offsets is None else self.offsets, y_TN,
            T, N, K, *self.extents, **self.constants, ROWS=rows, OUT=out, WORDS=32, num_warps=4, num_stages=4,
            **LAUNCH,
        )  # fmt: skip
        return y_TN

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The values [N, K] that the weight stands for."""
        shape = (self.out_features, self.in_features)
        if self.format == "fp8":
            return (self.data.float() * self.scales.unsqueeze(1)).to(dtype)
        values = torch.empty(shape, dtype=dtype, device=self.data.device)
        blocks, n_words, _ = self.data.shape
        _unpack[(blocks, triton.cdiv(n_words, 64))](
            self.data, self.scales, self.scales if self.offsets is None else self.offsets, values,
            *shape, n_words, self._n_groups, BITS=BITS[self.format], GROUP=self.group,
            AFFINE=self.offsets is not None, WORDS=64,
        )  # fmt: skip
        return values

    @property
    def extents(self) -> tuple[int, int]:
        """Words of a row and groups that have a scale, as `packed_sums` takes them; of fp8 they are not looked at."""
        return (0 if self.format == "fp8" else self.data.shape[1]), self._n_groups

    @property
    def constants(self) -> dict[str, Any]:
        """Of `packed_sums`."""
        fp8 = self.format == "fp8"
        return {"BITS": BITS[self.format], "GROUP": self.group, "AFFINE": self.offsets is not None, "FP8": fp8}

    @property
    def _n_groups(self) -> int:
        return self.scales.shape[1] if self.format == "int4" else 1


def from_packed(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> PackedLinear:
    """A packed folder's weight, int8 or int4, on the device as it lies in the file."""

    if weight.scales is None:
        raise ValueError(f"{weight.format}: expected int8 or int4, which have scales")
    data, scales, offsets = (
        None if array is None else torch.from_numpy(array.copy()).to(device)
        for array in (weight.data.view(np.int32).squeeze(-1), weight.scales, weight.offsets)
    )
    return PackedLinear(
        weight.format, weight.shape, weight.group, cast(torch.Tensor, data), cast(torch.Tensor, scales), offsets, dtype
    )


def to_fp8(weight_NK: torch.Tensor) -> PackedLinear:
    """Rounded to nearest, each output's largest value at the format's largest, 448."""
    top = torch.finfo(e4m3).max
    scales = weight_NK.float().abs().amax(1) / top
    codes = (weight_NK.float() / torch.where(scales > 0, scales, 1.0).unsqueeze(1)).to(e4m3)
    return PackedLinear("fp8", (weight_NK.shape[0], weight_NK.shape[1]), 0, codes, scales, None, weight_NK.dtype)


def round_linears(model: nn.Module) -> None:
    """In place, layer by layer: every linear layer's weight to fp8; norms, routers, embeddings stay, tied ones too."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and is_linear(f"{name}.weight"):
            model.set_submodule(name, to_fp8(layer.weight.detach()))


def joined(layers: Sequence[PackedLinear]) -> PackedLinear | None:
    """Layers that read the same rows as one, of which their own parts become views; None where their formats differ, or
    a block of outputs would be cut."""
    first = layers[0]
    whole = all(layer.out_features % BLOCK == 0 for layer in layers[:-1])
    if not alike(layers) or not (whole or first.format == "fp8"):
        return None
    rows = sum(layer.out_features for layer in layers)
    return PackedLinear(first.format, (rows, first.in_features), first.group, *laid_together(layers), first.dtype)


def alike(layers: Sequence[PackedLinear]) -> bool:
    return len({(layer.format, layer.group, layer.offsets is None) for layer in layers}) == 1


def laid_together(layers: Sequence[PackedLinear]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """data, scales and offsets of layers that are alike, one after the other; the layers' own become views of them."""
    parts: list[torch.Tensor | None] = []
    for name in ("data", "scales", "offsets"):
        own = [getattr(layer, name) for layer in layers]
        parts.append(None if own[0] is None else torch.cat(own))
        if parts[-1] is not None:
            for layer, view in zip(layers, parts[-1].split([len(part) for part in own]), strict=True):
                setattr(layer, name, view)
    return cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple(parts))
