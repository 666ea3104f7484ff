"""What a run needs to go on as if it had never stopped: one safetensors file, replaced whole.

Tensors `model.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` in fp32; the rest is text in the header. The order of the
data is a function of the step and nothing else is random after the first step, so no generator is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.writer import atomic_file, require_space, write_safetensors
from maestrale.errors import CheckpointError, UsageError

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Where a run reads and writes, how often it reports, and how many steps a second it makes: none changes its numbers.
_FREE = {"out", "train", "heldout", "log_every", "heldout_every", "save_every"}


@dataclass(frozen=True)
class Progress:
    """step: steps done. data: a digest of the packed training text. seconds: spent so far."""

    step: int
    data: str
    seconds: float


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, settings: Mapping[str, Any]
) -> None:
    """Writes the state to `path`. Killed at any moment, it leaves the one that was there before."""
    tensors = _tensors(model, optimizer)
    entries = [(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    metadata = {"progress": json.dumps(vars(progress)), "settings": json.dumps(settings)}
    require_space(path.parent, sum(4 * tensor.numel() for tensor in tensors.values()))
    with atomic_file(path) as partial:
        stored = (StoredTensor.from_array(tensor.numpy(), "F32") for tensor in tensors.values())
        write_safetensors(partial, entries, stored, metadata)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> Progress:
    """Puts a state back. UsageError where it was made with other settings, shown; CheckpointError where damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        progress, before = Progress(**json.loads(header["progress"])), json.loads(header["settings"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or no training state: {error}; --force begins again") from None
    _require_equal(path, before, settings)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(float(progress.step))} | {
            moment: torch.zeros_like(parameter) for moment in _MOMENTS
        }
    tensors = _tensors(model, optimizer)
    if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in tensors.items()}:
        raise CheckpointError(f"{path}: its tensors are not those of this model; --force begins again")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
    return progress


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def _require_equal(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    flat_before, flat_now = _flat(before), _flat(now)
    changed = [
        f"{name} was {flat_before.get(name)!r}, is {flat_now.get(name)!r}"
        for name in sorted(flat_before | flat_now)
        if name not in _FREE and flat_before.get(name) != flat_now.get(name)
    ]
    if changed:
        raise UsageError(
            f"{path}: cannot resume with another configuration: {'; '.join(changed)}; "
            "restore the old values, or --force begins again"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
