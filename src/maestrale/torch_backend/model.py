"""The numerics of record: a Mistral or Mixtral decoder, as its checkpoints define it.

It knows nothing of pages, batches, ranks, quantization or devices: `attend` is handed in by whoever runs it.
Rules N3 to N8 are in docs/numerics.md; the legend of shape suffixes in docs/map.md:
T tokens in the step, D dim, H query heads, G kv heads, C head_dim, F hidden_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from maestrale.config import ModelConfig
from maestrale.torch_backend.moe import MixtureOfExperts

# (layer, q_THC, k_TGC, v_TGC) → y_THC: remembers k and v as it likes, and lets each query see what it may see.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Transformer(nn.Module):
    """tokens_T, positions_T → logits_NV in fp32. Parameters bear the canonical names of plan.py."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = empty_embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(i, config) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, attend: Attend, rows_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`rows_N`: the rows whose logits are wanted; None is all of them."""
        x_ND = self.hidden_states(tokens_T, positions_T, attend, rows_N)
        return self.output(x_ND).float()  # N8: logits leave in fp32

    def hidden_states(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, attend: Attend, rows_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the output layer reads: x_ND, after the last norm."""
        x_TD = self.tok_embeddings(tokens_T)
        turns_TP = rope_turns(positions_T, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers[:-1]:
            x_TD = layer(x_TD, turns_TP, attend)
        x_ND = self.layers[-1](x_TD, turns_TP, attend, rows_N)
        return self.norm(x_ND)


def empty_embedding(rows: int, dim: int) -> nn.Embedding:
    """Without the values that torch would draw: for a meta tensor, drawing them imports its compiler (1.5 s)."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


class Block(nn.Module):
    """Attention, then feed-forward, each on a normed copy and added back."""

    def __init__(self, index: int, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(index, config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward: nn.Module
        if config.moe is None:
            self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        else:
            experts = (FeedForward(config.dim, config.hidden_dim) for _ in range(config.moe.num_experts))
            self.feed_forward = MixtureOfExperts(config.dim, config.moe.num_experts_per_tok, experts)

    def forward(
        self,
        x_TD: torch.Tensor,
        turns_TP: torch.Tensor,
        attend: Attend,
        rows_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), turns_TP, attend)
        if rows_N is not None:
            x_TD = x_TD[rows_N]  # in the last block nobody looks at the other rows any more
        return x_TD + self.feed_forward(self.ffn_norm(x_TD))


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G heads of keys and values."""

    def __init__(self, index: int, config: ModelConfig):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_TD: torch.Tensor, turns_TP: torch.Tensor, attend: Attend) -> torch.Tensor:
        q_THC = rope(self.wq(x_TD).unflatten(-1, (-1, self.head_dim)), turns_TP)
        k_TGC = rope(self.wk(x_TD).unflatten(-1, (-1, self.head_dim)), turns_TP)
        v_TGC = self.wv(x_TD).unflatten(-1, (-1, self.head_dim))
        return self.wo(attend(self.index, q_THC, k_TGC, v_TGC).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). One expert of a mixture is the same thing."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.gated = gated

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.w2(self.gated(self.w1(x_TD), self.w3(x_TD)))


def gated(a_TF: torch.Tensor, b_TF: torch.Tensor) -> torch.Tensor:
    return silu(a_TF) * b_TF


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), times a weight for each channel (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        # N3: in fp32 (the kernel's own temporaries: written out, they cost ten times as much), then the weight.
        return rms_norm(x_TD, x_TD.shape[-1:], None, self.eps) * self.weight


def rope_turns(positions_T: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """e^(i * position * theta^(-2j / head_dim)), complex64 [T, head_dim / 2] (RoFormer, section 3.2)."""
    j = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device)
    angles_TC = torch.outer(positions_T.float(), theta ** (-j / head_dim))
    return torch.complex(angles_TC.cos(), angles_TC.sin())


def rope(x_THC: torch.Tensor, turns_TP: torch.Tensor) -> torch.Tensor:
    """Turns each pair (2j, 2j + 1) of a head, taken as a complex number, by its position's angle.

    N4: in fp32, then cast back. One complex product costs a third of the same sums written out.
    """
    pairs_THC = torch.view_as_complex(x_THC.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_THC * turns_TP.unsqueeze(1)).flatten(-2).to(x_THC.dtype)
