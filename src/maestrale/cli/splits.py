"""`maestrale inspect --devices`: which divisions of a model fit some devices, and how long a step should take.

The formulas are those of docs/scaling.md. A decode step reads a rank's weights and its part of the cache once, so it
takes their bytes over the memory's bandwidth; an all-reduce of n bytes over T shards takes
2 (T - 1) (latency + n / (T * link)), twice a layer; stages hand on n bytes, P - 1 times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from maestrale.config import ModelConfig
from maestrale.errors import UsageError
from maestrale.mesh import Mesh, Shard, shards
from maestrale.plan import cache_bytes, tensor_plan

_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}
_MAX_DEVICES = 1024


@dataclass(frozen=True)
class Devices:
    """count devices of `memory` bytes each. bandwidth: of a device's memory, link: between two, in bytes/s.
    latency: of a message, seconds."""

    count: int
    memory: int
    bandwidth: float
    link: float
    latency: float = 10e-6


def read_devices(text: str, bandwidth: float, link: float) -> Devices:
    """ "2x24GB" and the speeds in GB/s. UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,4})\s*x\s*(\d{1,6}(?:\.\d+)?)\s*(MB|GB|MiB|GiB)\s*", text, re.IGNORECASE)
    if not found or not 1 <= int(found[1]) <= _MAX_DEVICES:
        raise UsageError(f"--devices {text!r}: expected 2x24GB or the like, at most {_MAX_DEVICES} devices")
    for name, value in (("--device-bandwidth", bandwidth), ("--link", link)):
        if not 0 < value < 1e6:
            raise UsageError(f"{name} {value}: expected GB/s, above 0")
    return Devices(int(found[1]), int(float(found[2]) * _UNITS[found[3].upper()]), bandwidth * 1e9, link * 1e9)


def splits(config: ModelConfig, devices: Devices, length: int, batch: int, element_bytes: int) -> list[dict[str, Any]]:
    """Every division over exactly `devices.count` ranks, the fastest for one sequence first, those that do not fit
    last. Bytes are those of the fullest rank; times in seconds."""
    found, sizes = [], {name: plan.size * element_bytes for name, plan in tensor_plan(config).items()}
    for tensor in range(1, devices.count + 1):
        if devices.count % tensor:
            continue
        groups = [1] if config.moe is None else [e for e in range(1, tensor + 1) if tensor % e == 0]
        for expert in groups:
            mesh = Mesh(devices.count // tensor, tensor, expert)
            try:
                ranks = shards(config, mesh, sizes, devices.memory)
            except UsageError:
                continue
            found.append(_cost(config, mesh, ranks, devices, length, batch, element_bytes))
    return sorted(found, key=lambda split: (not split["fits"], split["seconds_per_token"]))


def _cost(
    config: ModelConfig,
    mesh: Mesh,
    ranks: list[Shard],
    devices: Devices,
    length: int,
    batch: int,
    element_bytes: int,
) -> dict[str, Any]:
    weights = [rank.parameters * element_bytes for rank in ranks]
    caches = [batch * cache_bytes(rank.local_config, length, element_bytes) for rank in ranks]
    message = batch * config.dim * element_bytes
    stages = []
    for stage in range(mesh.pipeline):
        members = ranks[stage * mesh.tensor : (stage + 1) * mesh.tensor]
        read = max(
            _read(config, r, batch) * element_bytes + c
            for r, c in zip(members, caches[stage * mesh.tensor :], strict=False)
        )
        reduce = 2 * (mesh.tensor - 1) * (devices.latency + message / (mesh.tensor * devices.link))
        stages.append(read / devices.bandwidth + 2 * len(members[0].layers) * reduce)
    hop = devices.latency + message / devices.link
    return {
        "pipeline": mesh.pipeline,
        "tensor": mesh.tensor,
        "expert": mesh.expert,
        "weight_bytes": max(weights),
        "cache_bytes": max(caches),
        "fits": max(w + c for w, c in zip(weights, caches, strict=True)) <= devices.memory,
        "seconds_per_token": sum(stages) + hop * (mesh.pipeline - 1),
        # With at least P groups of sequences under way a group leaves each time the slowest stage has done one.
        "tokens_per_second": batch / (max(stages) + (hop if mesh.pipeline > 1 else 0)),
    }


def _read(config: ModelConfig, rank: Shard, batch: int) -> float:
    """Elements of the weights that a rank reads in a decode step: of the experts, those that somebody chose."""
    moe, total, experts = config.moe, 0, 0
    plan = tensor_plan(config)
    for name, slices in rank.tensors():
        size = 1
        for extent in slices:
            size *= extent.stop - extent.start
        if name == "tok_embeddings.weight" and not (config.tied_embeddings and rank.last):
            size = batch * plan[name].shape[1]  # rows are gathered
        if ".experts." in name:
            experts += size
        else:
            total += size
    if moe is None:
        return total
    chosen = 1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** batch  # of each expert, were routing even
    return total + experts * chosen
