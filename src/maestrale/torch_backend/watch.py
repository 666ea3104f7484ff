"""Which experts a mixture's router chose, seen from outside: the model does not know that it is watched."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.moe import MixtureOfExperts, route


class Watch:
    """Within it, each mixture's router scores [T, E] are kept in `scores` as they leave the gate, layer by layer;
    outside it nothing is hooked or kept."""

    def __init__(self, model: Transformer):
        self._mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
        self.scores: list[torch.Tensor] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        def keep(gate: nn.Module, x: tuple[torch.Tensor], scores_TE: torch.Tensor) -> None:
            self.scores.append(scores_TE)

        self._hooks = [mixture.gate.register_forward_hook(keep) for mixture in self._mixtures]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def experts(self, rows_N: torch.Tensor) -> NDArray[np.int16]:
        """int16 [N, layers, K]: the choices of the wanted rows; a model's last layer has computed no others."""
        scores = [scores if len(scores) == len(rows_N) else scores[rows_N] for scores in self.scores]
        chosen = [route(s_NE, mixture.n_chosen)[1] for s_NE, mixture in zip(scores, self._mixtures, strict=True)]
        return torch.stack(chosen, dim=1).to(torch.int16).cpu().numpy()
