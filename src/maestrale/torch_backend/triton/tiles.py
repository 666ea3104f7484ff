"""How a step's queries are dealt out to the attention kernel's programs; numpy and torch only, so that it is cheap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.torch_backend.staging import put

_PROGRAMS = 528  # of decoding attention that fill a large GPU: 4 on each of 132 multiprocessors, which holds 5
_MAX_SPLITS = 32


@dataclass(frozen=True)
class Tiles:
    """chunks, decodes: int32 [n, 3], (sequence, first row, rows) of each tile; a decode is a tile of one row.

    queries: the most rows of a chunk's tile. splits: programs among which a decode's keys are divided.
    """

    chunks: torch.Tensor
    decodes: torch.Tensor
    queries: int
    splits: int


def n_splits(n_decodes: int, n_kv_heads: int) -> int:
    """By the size of the batch alone, so that a captured graph fits every length."""
    wanted = _PROGRAMS // max(1, n_decodes * n_kv_heads)
    return min(_MAX_SPLITS, 1 << wanted.bit_length() - 1) if wanted else 1


def tile_queries(n_heads: int, n_kv_heads: int) -> int:
    """Queries of a chunk's tile: as many as make 128 rows with the heads of a kv head, at least one."""
    heads = 1 << (n_heads // n_kv_heads - 1).bit_length()
    return max(1, 128 // heads)


def deal(starts: NDArray[np.int64], n_heads: int, n_kv_heads: int, device: torch.device) -> Tiles:
    """starts: those of a Batch. Tiles with the most keys before them go first: they end last."""
    counts, queries = np.diff(starts), tile_queries(n_heads, n_kv_heads)
    alone = np.flatnonzero(counts == 1)
    decodes = np.stack([alone, starts[alone], np.ones_like(alone)], 1)
    chunks = np.array(
        [
            (b, starts[b] + at, min(queries, counts[b] - at))
            for b in np.flatnonzero(counts > 1)
            for at in range((counts[b] - 1) // queries * queries, -1, -queries)
        ],
        np.int64,
    ).reshape(-1, 3)

    def put_int32(tiles: NDArray[np.int64]) -> torch.Tensor:
        return put(tiles.astype(np.int32), device)

    return Tiles(put_int32(chunks), put_int32(decodes), queries, n_splits(len(alone), n_kv_heads))
