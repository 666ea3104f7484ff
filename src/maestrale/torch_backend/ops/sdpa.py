"""Attention by torch's scaled_dot_product_attention, in the two shapes that its CPU and CUDA kernels are fast in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from maestrale.torch_backend.ops.groups import Group, gather

_BLOCK = 64  # queries: 6.3 ms for a chunk of 512, 12 heads of 64, one core; 14.0 ms all at once


def attend(q_THC: torch.Tensor, k_SGC: torch.Tensor, v_SGC: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """As reference.attend. Query heads of one kv head are laid side by side, so no key or value is repeated in memory
    (`enable_gqa=True` repeats them on the CPU: 6 to 15 times slower at decode)."""
    (_, H, C), G = q_THC.shape, k_SGC.shape[1]
    outputs = []
    for group in groups:
        (B, N), S = group.rows_BN.shape, group.keys_BS.shape[1]
        k_BGSC, v_BGSC = (
            gather(pool_SGC, group.keys_BS.view(-1), q_THC.dtype).view(B, S, G, C).transpose(1, 2)
            for pool_SGC in (k_SGC, v_SGC)
        )
        q_NHC = q_THC if len(groups) == 1 else q_THC.index_select(0, group.rows_BN.view(-1))
        if N == 1:  # decode: the H / G query heads of a kv head become its queries
            y = scaled_dot_product_attention(q_NHC.view(B, G, H // G, C), k_BGSC, v_BGSC, group.mask_BNS.unsqueeze(1))
            outputs.append(y.reshape(B, H, C))
        else:  # a chunk of one sequence: kv heads become the batch, their query heads the heads
            q_GHNC = q_NHC.view(N, G, H // G, C).permute(1, 2, 0, 3)
            k_GHSC = k_BGSC.transpose(0, 1).expand(G, H // G, S, C)
            v_GHSC = v_BGSC.transpose(0, 1).expand(G, H // G, S, C)
            # A mask of three dimensions, unlike one of two, would leave the fast kernel. On the CPU that kernel works
            # on what the mask hides too: short blocks of queries, each with the keys up to its last, save up to half.
            mask_NS, block = group.mask_BNS[0], _BLOCK if q_THC.device.type == "cpu" else N
            for start in range(0, N, block):
                n = slice(start, min(start + block, N))
                s = slice(S - N + n.stop)
                y = scaled_dot_product_attention(q_GHNC[:, :, n], k_GHSC[:, :, s], v_GHSC[:, :, s], mask_NS[n, s])
                outputs.append(y.permute(2, 0, 1, 3).reshape(-1, H, C))
    if len(groups) == 1:
        return torch.cat(outputs)
    rows_T = torch.cat([group.rows_BN.view(-1) for group in groups])
    return torch.empty_like(q_THC).index_copy_(0, rows_T, torch.cat(outputs))
