"""What a run needs to go on as if it had never stopped: one safetensors file, replaced whole.

Tensors `model.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` of what learns, in fp32; the rest is text in the header. The
order of the data is a function of the step and nothing else is random after the first step, so no generator is stored.
On several ranks the same tensors stand in a folder that torch's distributed checkpointing writes, each rank its part.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.writer import atomic_file, require_space, write_safetensors
from maestrale.errors import CheckpointError, UsageError, first_line
from maestrale.torch_backend.train.parallel import Ranks
from maestrale.torch_backend.train.settings import LoopSettings

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Where a run reads and writes, how often it reports, and how many steps a second it makes: none changes its numbers.
_FREE = {"out", "train", "heldout", "own", "log_every", "heldout_every", "save_every", "tensorboard"}
# What runs did before these keys were there.
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(LoopSettings) if f.default is not dataclasses.MISSING}


@dataclass(frozen=True)
class Progress:
    """step: steps done. data: a digest of the training data. seconds: spent so far. best: the lowest held-out loss,
    where the best weights are kept."""

    step: int
    data: str
    seconds: float
    best: float | None = None


class States:
    """The states in a run's folder."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        self.path = folder / ("state.safetensors" if ranks.size == 1 else "state.json")
        self.best = folder / "best.safetensors"

    def exists(self) -> bool:
        return self.path.exists()

    def kept(self) -> str:
        return f"{self.path} holds the last good state" if self.exists() else "no state was saved yet"

    def clear(self) -> None:
        """Removes the states of a run before."""
        if self.ranks.first:
            for path in (self.path, self.best):
                path.unlink(missing_ok=True)

    def require_space(self, model: nn.Module) -> None:
        """DiskError, before anything is learnt, unless there is room for a state, and for the next one beside it."""
        size = sum(4 * (1 + len(_MOMENTS)) * parameter.numel() for _, parameter in _learning(model))
        require_space(self.folder, size if self.exists() else 2 * size)

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, settings: Mapping[str, Any]
    ) -> None:
        if self.ranks.size == 1:
            save_state(self.path, model, optimizer, progress, settings)
            return
        from torch.distributed import barrier, checkpoint

        parts = f"state.{progress.step}"
        checkpoint.save(_tensors(model, optimizer), checkpoint_id=self.folder / parts)
        if self.ranks.first:  # the parts count from the moment that this file names them
            with atomic_file(self.path) as partial:
                header = {"parts": parts, "progress": vars(progress), "settings": dict(settings)}
                partial.write_text(json.dumps(header), encoding="utf-8")
            for old in self.folder.glob("state.[0-9]*"):
                if old.name != parts:
                    shutil.rmtree(old, ignore_errors=True)
        barrier()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> Progress:
        if self.ranks.size == 1:
            return load_state(self.path, model, optimizer, settings)
        from torch.distributed import checkpoint

        try:
            header = json.loads(self.path.read_text(encoding="utf-8"))
            progress, before, parts = Progress(**header["progress"]), header["settings"], self.folder / header["parts"]
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: damaged, or no training state: {error}; --force begins again"
            ) from None
        _require_equal(self.path, before, settings)
        _begin(model, optimizer, progress.step)
        try:
            checkpoint.load(_tensors(model, optimizer), checkpoint_id=parts)
        except (OSError, RuntimeError, ValueError, checkpoint.CheckpointException) as error:
            raise CheckpointError(f"{parts}: damaged: {first_line(error)}; --force begins again") from None
        return progress

    def save_best(self, model: nn.Module) -> None:
        """Keeps what has been learnt so far beside the states."""
        whole = {name: self.ranks.whole(parameter) for name, parameter in _learning(model)}
        if self.ranks.first:
            _write(self.best, whole, {})

    def load_best(self, model: nn.Module) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.best, "pt") as file, torch.no_grad():
                for name, parameter in _learning(model):
                    value = file.get_tensor(name)
                    if isinstance(parameter, torch.distributed.tensor.DTensor):
                        placed = torch.distributed.tensor.distribute_tensor(
                            value, parameter.device_mesh, parameter.placements
                        )
                        parameter.copy_(placed)
                    else:
                        parameter.copy_(value)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.best}: damaged or gone: {error}") from None


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, settings: Mapping[str, Any]
) -> None:
    """Writes the state to `path`. Killed at any moment, it leaves the one that was there before."""
    _write(path, _tensors(model, optimizer), {"progress": json.dumps(vars(progress)), "settings": json.dumps(settings)})


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
    _begin(model, optimizer, progress.step)
    tensors = _tensors(model, optimizer)
    if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in tensors.items()}:
        raise CheckpointError(f"{path}: its tensors are not those of this model; --force begins again")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
    return progress


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    entries = [(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    require_space(path.parent, sum(4 * tensor.numel() for tensor in tensors.values()))
    with atomic_file(path) as partial:
        stored = (StoredTensor.from_array(tensor.detach().cpu().numpy(), "F32") for tensor in tensors.values())
        write_safetensors(partial, entries, stored, metadata)


def _begin(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Moments for a state to be read into."""
    for _, parameter in _learning(model):
        optimizer.state[parameter] = {"step": torch.tensor(float(step))} | {
            moment: torch.zeros_like(parameter) for moment in _MOMENTS
        }


def _learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _learning(model):
        tensors[f"model.{name}"] = parameter.detach()
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def _require_equal(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    flat_now = _flat(now)
    flat_before = {name: value for name, value in _DEFAULTS.items() if name in flat_now} | _flat(before)
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
