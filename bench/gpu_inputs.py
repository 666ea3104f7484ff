"""What bench/gpu.py runs on: random models made on the device, batches, lengths."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from maestrale.batch import Batch, CacheLayout, Draws
from maestrale.checkpoint.packed_room import is_linear
from maestrale.config import ModelConfig
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.triton.packed import PackedLinear


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Weights such that what goes through a layer keeps its size."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.data.fill_(1)
    return model.requires_grad_(False).eval()


def random_int4(model: Transformer) -> Transformer:
    """Every linear layer's weight replaced, in place, by random int4 codes in groups of 32."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and is_linear(f"{name}.weight"):
            (n, k), device = layer.weight.shape, layer.weight.device
            words = torch.randint(-(1 << 31), 1 << 31, (n // 16, k // 8, 16), dtype=torch.int32, device=device)
            scales = torch.full((n // 16, k // 32, 16), 0.2 * k**-0.5, dtype=torch.float16, device=device)
            packed = PackedLinear("int4", (n, k), 32, words, scales, None, layer.weight.dtype)
            model.set_submodule(name, packed)
    return model


def mixed(size: int, context: int, count: int) -> tuple[list[int], list[int]]:
    """Lengths of prompts and of completions: the longest alone; several, from a quarter of it upwards."""
    if size == 1:
        return [context], [count]
    shares = np.linspace(0.25, 1, size)
    order = np.random.default_rng(0).permutation(size)
    return (context * shares).astype(int).tolist(), (2 + count * shares[order]).astype(int).tolist()


def decode_batch(config: ModelConfig, layout: CacheLayout, size: int, context: int) -> Batch:
    """One token each, at position `context`, and a greedy one to come; the cache's pages hold whatever they hold."""
    ids = np.random.default_rng(size).integers(3, config.vocab_size, size)
    greedy = Draws(np.tile([0.0, 0, 0, 1, 0], (size, 1)), np.empty((0, 3)))
    return Batch(ids, np.full(size, context), np.arange(size + 1), tables(layout, size), no_copies(layout),
                 np.arange(size), draws=greedy)  # fmt: skip


def chunk_batch(config: ModelConfig, layout: CacheLayout, count: int, length: int, start: int = 0) -> Batch:
    ids = np.random.default_rng(start).integers(3, config.vocab_size, count * length)
    starts = np.arange(count + 1) * length
    positions = np.tile(np.arange(start, start + length), count)
    return Batch(ids, positions, starts, tables(layout, count), no_copies(layout), starts[1:] - 1)


def tables(layout: CacheLayout, size: int) -> tuple[np.ndarray, ...]:
    return tuple(
        np.arange(size * ring).reshape(size, ring) % pages
        for ring, pages in zip(layout.rings, layout.pages, strict=True)
    )


def no_copies(layout: CacheLayout) -> tuple[np.ndarray, ...]:
    return tuple(np.empty((0, 2), np.int64) for _ in layout.rings)
