"""Native folders: params.json and consolidated weights, whole, in shards, or in the second raw Mixtral layout."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from numpy.typing import NDArray

from maestrale.checkpoint.place import Place, expert_of, same_place
from maestrale.config import ModelConfig
from maestrale.plan import axis_sizes, tensor_plan

CONFIG = "params.json"
WEIGHTS = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"
IGNORED = re.compile(r"rope\.freqs")  # a table that is computed, not learned


def pickled_weights(folder: Path) -> list[Path]:
    """consolidated.00.pth, or consolidated.00.pt and those that follow it."""
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"consolidated\.\d+\.pth?", p.name))


def places(config: ModelConfig, stored: Collection[str]) -> dict[str, Place]:
    """Canonical name → where it is, in the layout that the stored names show."""
    plan = tensor_plan(config)
    if config.moe is None or not any(re.search(r"\.block_sparse_moe\.w[123]$", name) for name in stored):
        return {name: same_place(name, tensor) for name, tensor in plan.items()}
    sizes = axis_sizes(config)
    stacked = (config.moe.num_experts * config.hidden_dim, sizes["dim"])
    found = {}
    for name, tensor in plan.items():
        if ".experts." in name:
            layer, expert, matrix = expert_of(name)
            rows = slice(expert * config.hidden_dim, (expert + 1) * config.hidden_dim)
            select = partial(_rows, rows=rows, transposed=matrix == "w2")
            found[name] = Place(f"{layer}block_sparse_moe.{matrix}", stacked, (("experts", "hidden"), ("dim",)), select)
        else:
            found[name] = same_place(name.replace("feed_forward.gate", "block_sparse_moe.gate"), tensor)
    return found


def _rows(array: NDArray, rows: slice, transposed: bool) -> NDArray:
    return array[rows].T if transposed else array[rows]
