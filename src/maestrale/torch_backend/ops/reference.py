"""Attention as its formula reads, in fp32: the definition that every faster kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from maestrale.torch_backend.ops.groups import Group, gather


def attend(q_THC: torch.Tensor, k_SGC: torch.Tensor, v_SGC: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """softmax(q k^T / sqrt(C) + mask) v for each query over its own keys; returns y_THC in q's dtype.

    k_SGC, v_SGC: the whole cache of one layer, in q's dtype or fp8. Query head h reads kv head h // (H / G).
    """
    y_THC = torch.empty_like(q_THC)
    repeat = q_THC.shape[1] // k_SGC.shape[1]
    for group in groups:
        for rows_N, keys_S, mask_NS in zip(group.rows_BN, group.keys_BS, group.mask_BNS, strict=True):
            k_SHC = gather(k_SGC, keys_S, torch.float32).repeat_interleave(repeat, dim=1)
            v_SHC = gather(v_SGC, keys_S, torch.float32).repeat_interleave(repeat, dim=1)
            scores_HNS = torch.einsum("nhc,shc->hns", q_THC[rows_N].float(), k_SHC) * q_THC.shape[-1] ** -0.5  # N6
            weights_HNS = torch.softmax(scores_HNS + mask_NS, dim=-1)  # N7: softmax in fp32
            y_THC[rows_N] = torch.einsum("hns,shc->nhc", weights_HNS, v_SHC).to(q_THC.dtype)
    return y_THC
