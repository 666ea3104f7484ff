"""One step of learning: gradients over micro-batches, clipped, one AdamW update."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from maestrale.config import ModelConfig
from maestrale.torch_backend.model import Attention, Block, FeedForward, RMSNorm, Transformer
from maestrale.torch_backend.train.loss import balance_loss, packed_loss, router_scores
from maestrale.torch_backend.train.packing import IGNORED, Packed
from maestrale.torch_backend.train.settings import TrainSettings


def new_model(config: ModelConfig, seed: int) -> Transformer:
    """Normal weights of deviation sqrt(2 / (5 dim)) (Nguyen and Salazar, arXiv 1910.05895); those that write into
    the residual stream are divided by sqrt(2 n_layers), so that its size does not grow with depth."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    deviation = math.sqrt(2 / (5 * config.dim))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            into_stream = name.endswith(("wo.weight", "w2.weight"))
            scale = 1 / math.sqrt(2 * config.n_layers) if into_stream else 1.0
            nn.init.normal_(parameter, std=deviation * scale, generator=generator)
    return model


def new_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Matrices decay, the norms' weights do not.

    Every parameter has a gradient from the start: an expert that no token chose in a step takes part with zeros, so
    all parameters count the same steps.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Of step `step`, from 0: a line up to `lr`, then half a cosine down to a tenth of it."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
    return settings.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def compile_parts(model: Transformer) -> None:
    """torch.compile, in place. A mixture's routing stays as it is: the number of rows of an expert is data."""
    dense = model.config.moe is None
    # One graph for each layer, training and evaluating; the library's own limit of 8 would leave the rest uncompiled.
    torch._dynamo.config.recompile_limit = 8 + 4 * model.config.n_layers
    for module in model.modules():
        if isinstance(module, Block if dense else (Attention, RMSNorm)):
            module.compile()
        elif isinstance(module, FeedForward) and not dense:
            module.compile(dynamic=True)


def learn(
    model: Transformer, optimizer: torch.optim.Optimizer, data: Packed, rows: np.ndarray, settings: TrainSettings
) -> tuple[float, float]:
    """One update from the sequences `rows`: (nats a token before it, norm of the gradient before clipping).

    Without an update where either is no finite number: the caller must look.
    """
    n_labels = max(1, int((data.labels[rows] != IGNORED).sum()))
    moe = model.config.moe
    micro_batches = rows.reshape(-1, settings.micro_batch)
    total = 0.0
    for micro in micro_batches:
        tokens, labels, documents = tensors(data, micro)
        with router_scores(model) as scores, _autocast(settings):
            loss = packed_loss(model, tokens, labels, documents) / n_labels
        total += loss.item()
        if moe is not None:
            real = documents.flatten() >= 0
            balance = torch.stack([balance_loss(s, moe.num_experts_per_tok, real) for s in scores]).mean()
            loss = loss + settings.balance / len(micro_batches) * balance
        loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip).item()
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return total, norm


@torch.no_grad()
def evaluate(model: Transformer, data: Packed, rows: np.ndarray, settings: TrainSettings) -> tuple[float, int]:
    """(sum of nats, number of labels) over the sequences `rows`."""
    total, n_labels = 0.0, 0
    for start in range(0, len(rows), settings.micro_batch):
        micro = rows[start : start + settings.micro_batch]
        tokens, labels, documents = tensors(data, micro)
        with _autocast(settings):
            total += packed_loss(model, tokens, labels, documents).item()
        n_labels += int((labels != IGNORED).sum())
    return total, n_labels


def tensors(data: Packed, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, labels, documents) [B, L] int64 of some sequences."""
    tokens, labels, documents = (
        torch.from_numpy(values[rows].astype(np.int64)) for values in (data.tokens, data.labels, data.documents)
    )
    return tokens, labels, documents


def _autocast(settings: TrainSettings) -> torch.autocast | nullcontext:
    return torch.autocast("cpu", torch.bfloat16) if settings.bf16 else nullcontext()
