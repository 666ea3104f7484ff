"""The loss of packed sequences, and the load-balancing loss of a mixture.

B sequences of L tokens; the model sees them as T = B * L rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import cross_entropy, one_hot

from maestrale.batch import visible
from maestrale.torch_backend.model import Attend, Transformer
from maestrale.torch_backend.moe import MixtureOfExperts, route
from maestrale.torch_backend.train.packing import IGNORED

_BLOCK = 128  # queries


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
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        window, mask = windows[layer], masks[windows[layer]]
        blocks = []
        for start in range(0, L, _BLOCK):
            rows = slice(start, start + _BLOCK)
            keys = slice(0 if window is None else max(0, start - window + 1), start + _BLOCK)
            scores = (q[:, :, rows] @ k[:, :, keys].mT).float() * q.shape[-1] ** -0.5
            weights = torch.softmax(scores.masked_fill(~mask[:, :, rows, keys], -torch.inf), dim=-1)
            blocks.append(weights.to(v.dtype) @ v[:, :, keys])
        return torch.cat(blocks, 2).transpose(1, 2).flatten(0, 1)

    return attend


def packed_loss(
    model: Transformer, tokens_BL: torch.Tensor, labels_BL: torch.Tensor, documents_BL: torch.Tensor
) -> torch.Tensor:
    """The sum over labels of -log p(label), in nats, fp32."""
    attend = packed_attend(documents_BL, model.config.sliding_window)
    logits_TV = model(tokens_BL.flatten(), packed_positions(documents_BL), attend)
    return cross_entropy(logits_TV, labels_BL.flatten(), ignore_index=IGNORED, reduction="sum")


@contextmanager
def router_scores(model: Transformer) -> Iterator[list[torch.Tensor]]:
    """A list that fills with each mixture's router scores [T, E], layer by layer, while the model runs."""
    scores: list[torch.Tensor] = []
    gates = [module.gate for module in model.modules() if isinstance(module, MixtureOfExperts)]
    hooks = [gate.register_forward_hook(lambda gate, inputs, output: scores.append(output)) for gate in gates]
    try:
        yield scores
    finally:
        for hook in hooks:
            hook.remove()


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
