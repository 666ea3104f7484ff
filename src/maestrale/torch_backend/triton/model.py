"""The model's step by these kernels: what torch_backend/model.py defines, in ten launches a layer (for a few rows in
six) and without a shape that the host must learn from the device, so that a graph can hold the whole of it.

The weights are the Transformer's own. Those that read the same rows are laid together, and the model's parameters
become views of that, so nothing is held twice and every other way through the model goes on working.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from maestrale.torch_backend.cache import PagedCache
from maestrale.torch_backend.model import Block, FeedForward, Transformer, rope_turns
from maestrale.torch_backend.moe import MixtureOfExperts
from maestrale.torch_backend.triton.attention import attend
from maestrale.torch_backend.triton.experts import experts, group
from maestrale.torch_backend.triton.few import fits, gated_product, product, turned_product
from maestrale.torch_backend.triton.packed import PackedLinear, alike, joined
from maestrale.torch_backend.triton.packed_experts import PackedStack
from maestrale.torch_backend.triton.rows import norm, silu_product, turn_and_keep
from maestrale.torch_backend.triton.tiles import Tiles


@dataclass(frozen=True)
class Step:
    """A Batch on the device. tokens_T, positions_T, sequences_T: int32; padding is at position -1. tables: int32
    [B, ring] for each kind of layer. rows_N: int64, None for all rows in order."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    sequences_T: torch.Tensor
    tables: list[torch.Tensor]
    tiles: Tiles
    rows_N: torch.Tensor | None


# Half a layer: x and what is still to be added to it → likewise, after RMSNorm and feed-forward.
_Rows = tuple[torch.Tensor, torch.Tensor | None]


class _Dense:
    def __init__(self, part: FeedForward):
        self.w13, self.w2 = _together(part.w1, part.w3), _weight(part.w2)

    def __call__(self, x_TD: torch.Tensor, added_TD: torch.Tensor | None, gain_D: torch.Tensor, eps: float) -> _Rows:
        if fits(x_TD, self.w13, self.w2):
            x_TD = _sum(x_TD, added_TD)
            return product(gated_product(x_TD, self.w13, gain_D, eps), self.w2, residual_TN=x_TD), None
        x_TD, y_TD = norm(x_TD, gain_D, eps, added_TD)
        return x_TD, _times(silu_product(_times(y_TD, self.w13)), self.w2)


class _Mixture:
    def __init__(self, part: MixtureOfExperts):
        self.gate, self.n_chosen = part.gate.weight, part.n_chosen
        each = cast(list[FeedForward], list(part.experts))
        up, down = [layer for e in each for layer in (e.w1, e.w3)], [e.w2 for e in each]
        self.w13 = _packed(up) or _stacked(up).view(len(each), 2, -1, up[0].in_features)
        self.w2 = _packed(down) or _stacked(down).view(len(each), -1, down[0].in_features)

    def __call__(self, x_TD: torch.Tensor, added_TD: torch.Tensor | None, gain_D: torch.Tensor, eps: float) -> _Rows:
        x_TD, y_TD = norm(x_TD, gain_D, eps, added_TD)
        scores_TE = product(y_TD, self.gate) if fits(y_TD, self.gate) else linear(y_TD, self.gate)
        return x_TD, experts(y_TD, self.w13, self.w2, group(scores_TE, self.n_chosen))


class _Layer:
    def __init__(self, block: Block):
        attention = block.attention
        self.attention_norm, self.ffn_norm = block.attention_norm.weight, block.ffn_norm.weight
        self.wqkv = _together(attention.wq, attention.wk, attention.wv)
        self.wo = _weight(attention.wo)
        part = block.feed_forward
        self.feed_forward = _Mixture(part) if isinstance(part, MixtureOfExperts) else _Dense(cast(FeedForward, part))


class FusedTransformer:
    """`model` must stand as it was built: adapters come after."""

    def __init__(self, model: Transformer):
        self.config, self.model = model.config, model
        self.embeddings, self.last_norm = model.tok_embeddings.weight, model.norm.weight
        self.output = _weight(model.output)
        self.layers = [_Layer(cast(Block, block)) for block in model.layers]

    def logits(self, step: Step, cache: PagedCache) -> torch.Tensor:
        """logits_NV in fp32, of the wanted rows; the step's keys and values are in the cache afterwards."""
        eps, page_size = self.config.norm_eps, cache.layout.page_size
        turns_TP = rope_turns(step.positions_T, self.config.head_dim, self.config.rope_theta)
        turns = turns_TP.real.contiguous(), turns_TP.imag.contiguous()
        x_TD, added_TD = embedding(step.tokens_T, self.embeddings), None
        for i, layer in enumerate(self.layers):
            kind = cache.kind_of_layer[i]
            k_SGC, v_SGC = cache.pools[kind][:, cache.index_in_kind[i]]
            table_BR, window = step.tables[kind], cache.layout.windows[kind]
            place = k_SGC, v_SGC, *turns, step.positions_T, step.sequences_T, table_BR, page_size
            if fits(x_TD, layer.wqkv):
                x_TD, added_TD = _sum(x_TD, added_TD), None
                q_THC = turned_product(x_TD, layer.wqkv, layer.attention_norm, eps, *place)
            else:
                x_TD, y_TD = norm(x_TD, layer.attention_norm, eps, added_TD)
                q_THC = turn_and_keep(_times(y_TD, layer.wqkv), *place)
            y_TD = attend(q_THC, k_SGC, v_SGC, step.positions_T, table_BR, step.tiles, page_size, window).flatten(1)
            if step.rows_N is not None and i == len(self.layers) - 1:
                x_TD, y_TD = x_TD[step.rows_N], y_TD[step.rows_N]
            if fits(y_TD, layer.wo):
                x_TD, added_TD = product(y_TD, layer.wo, residual_TN=x_TD), None
            else:
                added_TD = _times(y_TD, layer.wo)
            x_TD, added_TD = layer.feed_forward(x_TD, added_TD, layer.ffn_norm, eps)
        if fits(x_TD, self.output):
            return product(_sum(x_TD, added_TD), self.output, self.last_norm, eps, dtype=torch.float32)
        return _times(norm(x_TD, self.last_norm, eps, added_TD)[1], self.output).float()  # N8


def _sum(x_TD: torch.Tensor, added_TD: torch.Tensor | None) -> torch.Tensor:
    return x_TD if added_TD is None else x_TD + added_TD


def _times(x_TD: torch.Tensor, weight: Any) -> torch.Tensor:
    """x w^T; weight: a tensor, or what is called with x."""
    return linear(x_TD, weight) if isinstance(weight, torch.Tensor) else weight(x_TD)


def _weight(layer: nn.Module) -> Any:
    """As `_times` takes it."""
    return layer.weight if isinstance(layer, nn.Linear) else layer


def _together(*layers: nn.Module) -> Any:
    """Layers that read the same rows as one, whose outputs lie one after the other, as `_times` takes it."""
    if all(isinstance(layer, PackedLinear) for layer in layers):
        one = joined(cast(tuple[PackedLinear, ...], layers))
        if one is not None:
            return one
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return lambda x_TD: torch.cat([layer(x_TD) for layer in layers], -1)
    return _stacked(layers)


def _packed(layers: Sequence[nn.Module]) -> PackedStack | None:
    """Experts' weights that are packed, all in one format; None of any others."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    return PackedStack(packed) if len(packed) == len(layers) and alike(packed) else None


def _stacked(layers: Sequence[nn.Module]) -> torch.Tensor:
    """The weights of linear layers one above the other; the layers' own become views of it."""
    weights = [cast(torch.Tensor, layer.weight) for layer in layers]
    whole = torch.cat(weights)
    for layer, view in zip(layers, whole.split([len(weight) for weight in weights]), strict=True):
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(view, requires_grad=False)
    return whole
