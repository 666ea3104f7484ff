"""Frozen linear layers in 4 bits, for fine-tuning what stands around them (QLoRA, arXiv 2305.14314): the very weights
that `quantize` writes for a folder of int4 and a runner reads from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from maestrale.checkpoint.packed import MIDDLE, PackedWeight, unpack
from maestrale.checkpoint.packed_room import is_linear
from maestrale.checkpoint.quantize import HEAD, Quantizer
from maestrale.checkpoint.reader import Checkpoint
from maestrale.checkpoint.rounding import fitting_group

_AT_ONCE = 1 << 18  # weights whose fp32 values exist at once: they stay in a core's cache


class Int4Linear(nn.Module):
    """A linear layer whose weight is unpacked when it is needed, forward and backward, and never kept."""

    packed: torch.Tensor  # uint8 [out, in / 2]: low halves are the first half of a row, high ones the second
    scales: torch.Tensor  # float16 [out, in / group]

    def __init__(self, weight: PackedWeight, dtype: torch.dtype):
        """weight: int4, symmetric. dtype: of the weight that is multiplied."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group, self.dtype, self._half = weight.group, dtype, self.in_features // 2
        codes, scales, _ = unpack(weight)
        packed = torch.from_numpy(codes[:, : self._half] | codes[:, self._half :] << 4)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", torch.tensor(scales), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], made anew: code times scale in fp32, as `dequantize` has it, rounded to dtype."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        # Compiled, it is one loop that keeps nothing in between.
        rows = self.out_features if torch.compiler.is_compiling() else max(1, _AT_ONCE // self.in_features)
        parts = zip(self.packed.split(rows), self.scales.split(rows), weight.split(rows), strict=True)
        for packed, scales, part in parts:
            values = torch.empty(part.shape, dtype=torch.float32)
            values[:, : self._half], values[:, self._half :] = packed & 15, packed >> 4
            values.sub_(MIDDLE).unflatten(1, (-1, self.group)).mul_(scales.float().unsqueeze(2))
            part.copy_(values)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x W^T; the gradient towards x alone, with the weight unpacked a second time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Int4Linear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grads[0] @ ctx.layer.weight.to(grads[0].dtype)).to(ctx.dtype), None


def int4_layer(
    checkpoint: Checkpoint, name: str, group: int, quantizer: Quantizer, dtype: torch.dtype
) -> Int4Linear | None:
    """The layer of a canonical weight: as it is stored where that is symmetric int4, else rounded by `quantizer`.

    None for what stays as it is: routers, head, embeddings, norms, and a layer whose inputs no group up to `group`
    divides.
    """
    if not is_linear(name) or name == HEAD:
        return None
    weight = checkpoint.packed(name)
    if weight is None or weight.format != "int4" or weight.offsets is not None:
        tensor = checkpoint.tensor(name)
        if (size := fitting_group(tensor.shape[-1], group)) is None:
            return None
        weight = quantizer(name, tensor, "int4", size)
    return Int4Linear(weight, dtype)
