"""How a step's queries meet their keys: made once a step and used by every layer of a kind.

Legend of suffixes: docs/map.md. B sequences of a group, N queries of each, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Group:
    """Sequences whose queries are attended to in one call.

    rows_BN: int64, rows of the step's q. keys_BS: int64, slots of the cache, short rows padded with slots of their own.
    mask_BNS: in q's dtype, 0 where visible and -inf where not (padding never is).
    Either B = 1 (a chunk of one sequence) or N = 1 (a decode step of several): no query is ever padded. The groups of a
    step hold each row once; a group that is alone holds them in order.
    """

    rows_BN: torch.Tensor
    keys_BS: torch.Tensor
    mask_BNS: torch.Tensor


def gather(pool_SGC: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The keys or values of these slots, in `dtype`. index_select, not pool[slots]: several times faster on the CPU."""
    return bits(pool_SGC).index_select(0, slots).view(pool_SGC.dtype).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes, since not every copy by index knows it; any other as it is."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
