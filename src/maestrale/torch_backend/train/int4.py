"""Frozen linear layers in 4 bits, for fine-tuning what stands around them (QLoRA, arXiv 2305.14314).

Groups of weights along a row share a scale: w ≈ scale * q, q from -8 to 7, the group's largest weight at -8 exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from maestrale.torch_backend.model import Transformer


class Int4Linear(nn.Module):
    """A linear layer whose weight is unpacked when it is needed, forward and backward, and never kept."""

    packed: torch.Tensor  # uint8 [out, in / 2], the low half first
    scales: torch.Tensor  # [out, in / group]

    def __init__(self, layer: nn.Linear, group: int):
        super().__init__()
        weight = layer.weight.detach()
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, weight.dtype
        groups = weight.float().unflatten(1, (-1, group))
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scales = torch.where(largest == 0, 1.0, largest / -8)
        q = (groups / scales).round().clamp(-8, 7).flatten(1).to(torch.int8) + 8
        self.register_buffer("packed", (q[:, ::2] | q[:, 1::2] << 4).view(torch.uint8))
        self.register_buffer("scales", scales.squeeze(2).to(weight.dtype))

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], made anew."""
        q = torch.stack([self.packed & 15, self.packed >> 4], 2).flatten(1).to(self.dtype) - 8
        return (q.unflatten(1, (self.scales.shape[1], -1)) * self.scales.unsqueeze(2)).flatten(1)

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


def to_int4(model: Transformer, group: int) -> None:
    """In place: every linear layer of the blocks whose rows are whole groups; routers, head and embeddings stay."""
    for name, module in list(model.named_modules()):
        inside = name.startswith("layers.") and not name.endswith(".gate")
        if isinstance(module, nn.Linear) and inside and module.in_features % group == 0:
            model.set_submodule(name, Int4Linear(module, group))
