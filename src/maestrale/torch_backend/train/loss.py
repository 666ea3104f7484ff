"""The loss of packed sequences, and the losses of a mixture's routers.

B sequences of L tokens; the model sees them as T = B * L rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from maestrale.batch import visible
from maestrale.torch_backend.model import Attend, Transformer
from maestrale.torch_backend.moe import route
from maestrale.torch_backend.train.packing import IGNORED

_BLOCK = 128  # queries
_HEAD_BYTES = 32 << 20  # of the logits that exist at once


def packed_positions(documents_BL: torch.Tensor) -> torch.Tensor:
    """Positions [T]: they count from the sequence's beginning and do not start again with a document.

    RoPE turns a query and a key by the difference of their positions and nothing else, so for a document further
    right it is all the same, and the table of angles is the same for every batch.
    """
    B, L = documents_BL.shape
    return torch.arange(L).repeat(B)


def packed_attend(documents_BL: torch.Tensor, windows: tuple[int | None, ...]) -> Attend:
    """Attention within documents of packed sequences. windows: of each layer, as ModelConfig.sliding_window.

    Queries go in blocks, each with just the keys that some query of it may see: half the time of
    scaled_dot_product_attention with a mask, forward and back (bfloat16, one core, L = 512, window 256).
    """
    B, L = documents_BL.shape
    positions = torch.arange(L)
    together_BLL = documents_BL.unsqueeze(2) == documents_BL.unsqueeze(1)
    masks = {w: (visible(positions[:, None], positions, w) & together_BLL).unsqueeze(1) for w in set(windows)}

    def attend(layer: int, q_THC: torch.Tensor, k_TGC: torch.Tensor, v_TGC: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (B, L)).transpose(1, 2) for x in (q_THC, k_TGC, v_TGC))
        window, mask = windows[layer], masks[windows[layer]]
        blocks = []
        for start in range(0, L, _BLOCK):
            rows = slice(start, start + _BLOCK)
            keys = slice(0 if window is None else max(0, start - window + 1), start + _BLOCK)
            part = q[:, :, rows], k[:, :, keys], v[:, :, keys], mask[:, :, rows, keys]
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # The weights are computed again for the gradient: kept, they would be most of what a layer keeps.
                blocks.append(checkpoint(_attend_block, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                blocks.append(_attend_block(*part))
        return torch.cat(blocks, 2).transpose(1, 2).flatten(0, 1)

    return attend


def _attend_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # N6
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)  # N7
    return weights.to(v.dtype) @ v


def packed_hidden(model: Transformer, tokens_BL: torch.Tensor, documents_BL: torch.Tensor) -> torch.Tensor:
    """What the output layer reads, x_TD."""
    attend = packed_attend(documents_BL, model.config.sliding_window)
    return model.hidden_states(tokens_BL.flatten(), packed_positions(documents_BL), attend)


def packed_loss(
    model: Transformer,
    tokens_BL: torch.Tensor,
    labels_BL: torch.Tensor,
    documents_BL: torch.Tensor,
    weights_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over labels of weight times -log p(label), in nats, fp32. Without weights each label counts 1."""
    x_TD = packed_hidden(model, tokens_BL, documents_BL)
    weights = torch.ones_like(labels_BL, dtype=torch.float32) if weights_BL is None else weights_BL
    return (token_losses(x_TD, model.output, labels_BL.flatten()) * weights.flatten()).sum()


def token_losses(x_TD: torch.Tensor, head: nn.Linear, labels_T: torch.Tensor) -> torch.Tensor:
    """-log p(label) of each row, fp32 [T], 0 where there is no label; never with all rows' logits at once.

    Rows without a label do not go through the head at all.
    """
    rows = (labels_T != IGNORED).nonzero().squeeze(1)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    found = _HeadLoss.apply(x_TD[rows], labels_T[rows], head, *parameters)
    return found.new_zeros(len(labels_T)).index_copy(0, rows, found)


class _HeadLoss(torch.autograd.Function):
    """Head and cross entropy, without all rows' logits in fp32.

    A frozen head's gradient is found on the way, block of rows by block. Where the head learns, how much each row
    counts must be known first: its logits are kept as they are if they are few, and else computed once more.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, labels_N: torch.Tensor, head: nn.Linear, *parameters: torch.Tensor
    ) -> torch.Tensor:
        # A head that learns costs a gradient for each part, as large in fp32 as twice as many rows as inputs in bf16.
        size = max(_rows(head.out_features), 2 * x_ND.shape[1] if parameters else 0)
        ctx.parts = [slice(start, start + size) for start in range(0, len(x_ND), size)]
        ctx.head, ctx.autocast, ctx.known = head, torch.is_autocast_enabled(x_ND.device.type), None
        at_once = x_ND.requires_grad and not parameters
        kept = torch.empty_like(x_ND) if at_once else x_ND
        losses_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        for part in ctx.parts:
            x, logits_NV = _logits(head, x_ND[part])
            losses_N[part] = _losses(logits_NV.detach(), labels_N[part], to_gradient=at_once)
            if at_once:
                (kept[part],) = torch.autograd.grad(logits_NV, x, logits_NV.detach())
            elif parameters and len(ctx.parts) == 1:
                ctx.known = x, logits_NV
        ctx.save_for_backward(kept, labels_N, *parameters)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, labels_N, *parameters = ctx.saved_tensors
        weight_N1 = grads[0].unsqueeze(1)
        if not parameters:
            return (kept * weight_N1).to(kept.dtype), None, None
        grad_x, sums = torch.empty_like(kept), list[torch.Tensor]()
        with torch.autocast(kept.device.type, torch.bfloat16, enabled=ctx.autocast):  # one cast of the weight for all
            for part in ctx.parts:
                x, logits_NV = ctx.known or _logits(ctx.head, kept[part])
                _losses(logits_NV.detach(), labels_N[part], to_gradient=True, weight_N1=weight_N1[part])
                grad_x[part], *found = torch.autograd.grad(logits_NV, [x, *parameters], logits_NV.detach())
                sums = [total.add_(grad) for total, grad in zip(sums, found, strict=True)] if sums else found
        ctx.known = None
        return grad_x, None, None, *(sums or map(torch.zeros_like, parameters))


def _logits(head: nn.Linear, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, its logits), from which gradients towards x and the head can be had."""
    with torch.enable_grad():
        x_ND = x_ND.detach().requires_grad_()
        return x_ND, head(x_ND)


def _losses(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, to_gradient: bool, weight_N1: torch.Tensor | None = None
) -> torch.Tensor:
    """Losses [N]; if `to_gradient`, the logits become the gradient of their sum, each times its weight, in place."""
    losses_N, size = logits_NV.new_empty(len(logits_NV), dtype=torch.float32), _rows(logits_NV.shape[1])
    for start in range(0, len(logits_NV), size):
        rows = slice(start, start + size)
        p_NV = torch.log_softmax(logits_NV[rows], dim=-1, dtype=torch.float32)  # N8: logits in fp32
        losses_N[rows] = -p_NV.gather(1, labels_N[rows].unsqueeze(1)).squeeze(1)
        if to_gradient:
            p_NV.exp_()[torch.arange(len(p_NV)), labels_N[rows]] -= 1
            logits_NV[rows] = p_NV if weight_N1 is None else p_NV.mul_(weight_N1[rows])
    return losses_N


def _rows(n_logits: int) -> int:
    return max(1, _HEAD_BYTES // (4 * n_logits))


def balance_loss(scores_TE: torch.Tensor, n_chosen: int, real_T: torch.Tensor) -> torch.Tensor:
    """E * Σ f_i P_i of one layer, over the rows that are `real_T` (no padding).

    f_i: choices of expert i for each token; P_i: its mean probability (Switch Transformers, arXiv 2101.03961,
    section 2.2, summed over the n_chosen choices). Evenly spread routing gives n_chosen, all on the same experts
    up to E.
    """
    n_experts = scores_TE.shape[1]
    weight_T1 = real_T.unsqueeze(1) / real_T.sum()
    _, experts_TK = route(scores_TE.detach(), n_chosen)
    f_E = (one_hot(experts_TK, n_experts).sum(1) * weight_T1).sum(0)
    p_E = (torch.softmax(scores_TE.float(), dim=-1) * weight_T1).sum(0)
    return n_experts * (f_E * p_E).sum()


def router_losses(
    scores: list[torch.Tensor], n_chosen: int, real_T: torch.Tensor, pooled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(load-balancing loss, router z-loss, choices of each expert [layers, E]) over the rows that are `real_T`.

    The balance is the mean over layers; pooled, it is that of all layers' rows together, which cannot see two layers
    that are skewed in opposite ways. z: the mean of logsumexp(scores)² (ST-MoE, arXiv 2202.08906, section 4.3).
    """
    if pooled:
        balance = balance_loss(torch.cat(scores), n_chosen, real_T.repeat(len(scores)))
    else:
        balance = torch.stack([balance_loss(s, n_chosen, real_T) for s in scores]).mean()
    z = torch.stack([s[real_T].float().logsumexp(-1).square().mean() for s in scores]).mean()
    loads = [one_hot(route(s.detach()[real_T], n_chosen)[1], s.shape[1]).sum((0, 1)) for s in scores]
    return balance, z, torch.stack(loads)
