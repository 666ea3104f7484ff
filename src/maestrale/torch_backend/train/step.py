"""One step of learning: gradients over micro-batches, clipped, one AdamW update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from maestrale.config import ModelConfig
from maestrale.torch_backend.model import Attention, Block, FeedForward, RMSNorm, Transformer
from maestrale.torch_backend.train.loss import router_losses
from maestrale.torch_backend.train.objective import Objective
from maestrale.torch_backend.train.parallel import Ranks
from maestrale.torch_backend.train.settings import LoopSettings
from maestrale.torch_backend.watch import Watch


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


def new_optimizer(model: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """Of all that can learn: matrices decay, vectors (the norms' weights, a DoRA's magnitudes) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=(0.9, 0.95), fused=True
    )


def learning_rate(settings: LoopSettings, step: int) -> float:
    """Of step `step`, from 0: a line up to `lr`, then along the schedule down to `lr_end` of it at the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[settings.schedule]
    end = settings.lr_end if settings.schedule != "constant" else 0.0
    return settings.lr * (end + (1 - end) * left)


def keep_less(model: Transformer, settings: LoopSettings) -> None:
    """In place: what a norm or a gate works out in between is not kept for the gradient but computed again, which
    takes no time to speak of; with `checkpointing`, nothing inside a block is kept. Compiled parts see to that alone.
    From outside, by a new `forward` of the instance, which hooks (FSDP's too) stay around: the model knows no mode of
    training.
    """
    again = functools.partial(functools.partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    for module in model.modules():
        if isinstance(module, RMSNorm) and not settings.compile:
            module.forward = again(functools.partial(_as_read, module.forward))  # type: ignore[method-assign]  # as above
        elif isinstance(module, FeedForward) and not settings.compile:
            module.gated = again(module.gated)
        elif isinstance(module, Block) and settings.checkpointing:
            module.forward = again(module.forward)  # type: ignore[method-assign]  # as above


def _as_read(norm: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
    """The norm in the dtype of the products that read it: each would make and keep a copy of its own."""
    y_TD = norm(x_TD)
    device = x_TD.device.type
    return y_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y_TD


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


@dataclass(frozen=True)
class Step:
    """loss: the objective's mean before the update. norm: of the gradient, before clipping. loads: the share of a
    mixture's choices that each expert had, [layers, E]."""

    loss: float
    norm: float
    loads: torch.Tensor | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def learn(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    rows: np.ndarray,
    settings: LoopSettings,
    ranks: Ranks | None = None,
) -> Step:
    """One update from the sequences `rows`, of which each rank does its share.

    Without an update where loss or gradient is no finite number: the caller must look.
    """
    ranks = ranks or Ranks()
    moe = model.config.moe
    weight = max(objective.weight(rows), 1e-9)
    micro_batches = ranks.share(rows).reshape(-1, settings.micro_batch)
    total, loads = torch.zeros(()), torch.zeros(())
    for micro in micro_batches:
        with Watch(model) as watch, autocast(settings):
            loss, real = objective.loss(model, micro)
        loss = loss / weight
        total += loss.detach().cpu()
        if moe is not None:
            scores = watch.scores[-model.config.n_layers :]  # of the last pass: a reference may have run before
            balance, z, chosen = router_losses(scores, moe.num_experts_per_tok, real, settings.balance_pooled)
            aside = settings.balance * balance + settings.router_z * z
            loss = loss + aside / (len(micro_batches) * ranks.size)
            loads = loads + chosen.cpu()
        (loss * ranks.size).backward()  # ranks average their gradients; the loss is their sum
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:  # of an expert that no token chose: it takes part, so
            parameter.grad = torch.zeros_like(parameter)  # that all count the same steps
    norm = ranks.clip_gradients(model, settings.grad_clip)
    total, loads = ranks.sum(total), ranks.sum(loads) if moe is not None else loads
    step = Step(total.item(), norm, loads / loads.sum(-1, keepdim=True) if moe is not None else None)
    if step.finite:
        optimizer.step()
    optimizer.zero_grad()  # gone, not zero: no memory is held for them while the next step's forward pass fills it
    return step


@torch.no_grad()
def evaluate(
    model: Transformer, objective: Objective, rows: np.ndarray, settings: LoopSettings, ranks: Ranks | None = None
) -> tuple[float, float]:
    """(sum of losses, sum of weights) over the sequences `rows`."""
    ranks = ranks or Ranks()
    total, size = torch.zeros(()), settings.micro_batch
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    for first in range(0, len(parts), ranks.size):
        number = first + ranks.rank
        with autocast(settings):  # a rank beyond the last part does it too, for the others need its weights
            loss, _ = objective.loss(model, parts[min(number, len(parts) - 1)])
        if number < len(parts):
            total += loss.cpu()
    ranks.rest(model)
    return ranks.sum(total).item(), objective.weight(rows)


def autocast(settings: LoopSettings) -> torch.autocast | nullcontext:
    return torch.autocast("cpu", torch.bfloat16) if settings.bf16 else nullcontext()
