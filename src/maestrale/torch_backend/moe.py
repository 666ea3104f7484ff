"""A sparse mixture of experts: each token goes through the K experts that a router scores highest.

Tokens are grouped by expert, so that each chosen expert is one dense product over just its tokens and an expert that
nobody chose is never read (Mixtral of Experts, arXiv 2401.04088, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class MixtureOfExperts(nn.Module):
    """x_TD → Σ over the chosen experts of router weight times expert(x)."""

    def __init__(self, dim: int, n_chosen: int, experts: Iterable[nn.Module]):
        super().__init__()
        self.n_chosen = n_chosen
        self.experts = nn.ModuleList(experts)
        self.gate = nn.Linear(dim, len(self.experts), bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        weights_TK, experts_TK = route(self.gate(x_TD), self.n_chosen)
        order = experts_TK.flatten().argsort(stable=True)  # (token, choice) pairs, expert after expert
        tokens, weights = order // self.n_chosen, weights_TK.flatten()[order].to(x_TD.dtype)
        counts = torch.bincount(experts_TK.flatten(), minlength=len(self.experts)).tolist()
        y_TD = torch.zeros_like(x_TD)
        # N5: experts are added in ascending order; each token meets an expert at most once, so the order is fixed.
        for expert, rows, weight in zip(self.experts, tokens.split(counts), weights.split(counts), strict=True):
            if rows.numel():
                y_TD.index_add_(0, rows, expert(x_TD[rows]) * weight.unsqueeze(-1))
        return y_TD


def route(scores_TE: torch.Tensor, n_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Router scores → (weights_TK in fp32 that add up to 1, experts_TK). N5: top k, then softmax over those k in fp32;
    of equal scores the lower expert wins, hence a stable sort where topk promises nothing."""
    sorted_TE, experts_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    return torch.softmax(sorted_TE[:, :n_chosen].float(), dim=-1), experts_TE[:, :n_chosen]
