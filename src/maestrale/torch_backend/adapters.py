"""Several adapters on one model at once, unmerged: each row of a step goes through the adapter of its sequence.

The base model's products are done once for all rows; an adapter adds its two thin ones for its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from maestrale.batch import Batch
from maestrale.checkpoint.adapter import Adapter, Delta
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.moe import MixtureOfExperts, route
from maestrale.torch_backend.staging import put


class Rows:
    """Which rows of a layer's input belong to which adapter, in the step that runs: [(adapter, rows)]."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, torch.Tensor]] = []

    def set(self, adapter_T: torch.Tensor | None) -> None:
        """adapter_T: the number of each row's adapter, -1 for none; None where no row has one."""
        self.groups = []
        if adapter_T is not None:
            for adapter in adapter_T.unique().tolist():
                if adapter >= 0:
                    self.groups.append((adapter, (adapter_T == adapter).nonzero().squeeze(1)))


class AdaptedLinear(nn.Module):
    """base(x), and in the rows of each adapter what that adds to this layer."""

    def __init__(self, base: nn.Linear, rows: Rows, deltas: Sequence[Delta | None]):
        super().__init__()
        self.base, self._rows = base, rows
        self._parts = [None if delta is None else _parts(base.weight, delta) for delta in deltas]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        for adapter, rows in self._rows.groups:
            if (parts := self._parts[adapter]) is not None:
                a, b, factor = parts
                added = y[rows] + linear(linear(x[rows], a), b)
                y[rows] = added if factor is None else added * factor
        return y


class Adapters:
    """The adapters of a model, put into it; `begin` says whose rows a step holds. all_rows: this is a part of a model
    and gives every row to the next part, whatever is wanted in the end."""

    def __init__(self, model: Transformer, adapters: Sequence[Adapter], all_rows: bool = False):
        self._all = Rows()
        self._wanted = self._all if all_rows else Rows()
        last = f"layers.{model.config.n_layers - 1}.feed_forward"
        experts: dict[str, dict[int, Rows]] = {}
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.deltas):
            # After the last block's attention only the rows whose logits are wanted go on.
            rows = self._wanted if name.startswith((last, "output")) else self._all
            if ".experts." in name:
                mixture, _, rest = name.partition(".experts.")
                rows = experts.setdefault(mixture, {}).setdefault(int(rest.split(".")[0]), Rows())
            base = cast(nn.Linear, model.get_submodule(name))
            model.set_submodule(name, AdaptedLinear(base, rows, [adapter.deltas.get(name) for adapter in adapters]))
        for name, rows_of in experts.items():
            mixture_layer = cast(MixtureOfExperts, model.get_submodule(name))
            self._follow(mixture_layer, self._wanted if name == last else self._all, rows_of)

    def begin(self, batch: Batch, device: torch.device) -> None:
        self._adapter_T = self._adapter_N = None
        if batch.adapters is not None:
            adapter_T = batch.adapters.repeat(np.diff(batch.starts))
            self._adapter_T = put(adapter_T, device)
            self._adapter_N = put(adapter_T[batch.logit_rows], device)
        self._wanted.set(self._adapter_N)
        self._all.set(self._adapter_T)  # last: the two may be the same

    def _follow(self, mixture: MixtureOfExperts, whole: Rows, rows_of: dict[int, Rows]) -> None:
        """Each expert gets the rows that chose it, in their order (moe.py); the router's scores say which."""

        def chosen(gate: nn.Module, inputs: object, scores_TE: torch.Tensor) -> None:
            adapter_T = self._adapter_T if whole is self._all else self._adapter_N
            if adapter_T is not None:
                experts_TK = route(scores_TE, mixture.n_chosen)[1]
            for expert, rows in rows_of.items():
                rows.set(None if adapter_T is None else adapter_T[(experts_TK == expert).any(1)])

        mixture.gate.register_forward_hook(chosen)


def _parts(weight: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(a, scale * b, DoRA's factor of each output) as the base computes."""
    a, b = torch.from_numpy(delta.a), torch.from_numpy(delta.b) * delta.scale
    factor = None
    if delta.magnitude is not None:
        norms = (weight.detach().float().cpu() + b @ a).norm(dim=1)
        factor = (torch.from_numpy(delta.magnitude) / norms).to(weight.device, weight.dtype)
    return a.to(weight.device, weight.dtype), b.to(weight.device, weight.dtype), factor
