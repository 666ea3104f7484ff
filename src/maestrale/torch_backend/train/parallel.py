"""A run on several ranks, under torchrun or mpirun: FSDP2 keeps a part of each weight, gradient and moment on each.

One process that no launcher started is a single rank, and nothing here does anything.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from maestrale.errors import UsageError
from maestrale.parallel.launcher import set_rendezvous, world
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.moe import MixtureOfExperts


class Ranks:
    """Which rank this is, of how many."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This rank's part of a step's rows; UsageError where they do not divide."""
        if len(rows) % self.size:
            raise UsageError(f"batch_size = {len(rows)} is not a multiple of the {self.size} ranks")
        return rows.reshape(self.size, -1)[self.rank]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return value

    def least(self, number: int) -> int:
        """The least of all ranks' numbers, when all have come to say theirs."""
        value = torch.tensor(number)
        if self.size > 1:
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN)
        return int(value)

    def clip_gradients(self, model: nn.Module, limit: float) -> float:
        """Scales all gradients so that their norm is `limit` at most; gives the norm that they had."""
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], limit)
        return (norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm).item()

    def shard(self, model: Transformer) -> None:
        """Cuts the weights of each block, and of what stands around the blocks, over the ranks."""
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.register_forward_hook(_touch_all_experts)
        mesh = init_device_mesh("cpu", (self.size,))  # left to itself, FSDP moves the weights to a GPU that it sees
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "hidden_states")

    def rest(self, model: nn.Module) -> None:
        """After a forward pass that no backward pass follows: each rank goes back to its parts."""
        if self.size > 1:
            for module in model.modules():
                if isinstance(module, torch.distributed.fsdp.FSDPModule):
                    module.reshard()

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter that may be cut, in one piece; all ranks must ask together."""
        value = parameter.detach()
        return value.full_tensor() if isinstance(value, torch.distributed.tensor.DTensor) else value


def _touch_all_experts(module: MixtureOfExperts, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """Gives experts that no token chose on this rank a gradient of zero: all ranks reduce the same weights."""
    return output + sum(expert(inputs[0][:0]).sum() for expert in module.experts)


@contextmanager
def ranks_of_torchrun() -> Iterator[Ranks]:
    """The ranks that torchrun or mpirun started, joined for the block; a single one where none did. UsageError where
    what they tell a process is wrong."""
    rank, size, _ = world()
    if size == 1 or not torch.distributed.is_available():
        yield Ranks()
        return
    set_rendezvous(size)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    ranks = Ranks(rank, size)
    try:
        yield ranks
        # None leaves before the first has written: where one comes to grief at its end, a launcher ends them all.
        ranks.sum(torch.zeros(1))
    finally:
        # FSDP's modules hold the group, in cycles, and gloo's threads would abort the process that ends around them.
        gc.collect()
        torch.distributed.destroy_process_group()
