"""Rounding that looks at what a layer's inputs are: GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1).

Inputs are rounded one after the other; what an input's rounding adds to the layer's squared output error on the
calibration text is taken back, as far as it goes, by changing the inputs not yet rounded. The text runs through the
model layer by layer: each layer is measured on what the quantized layers before it give, then rounded.
T tokens, D dim, N outputs, K inputs of a linear layer, B sequences of L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.packed import MIDDLE, PackedWeight, dequantize, pack_int4, pack_int8
from maestrale.checkpoint.packed_room import is_linear
from maestrale.checkpoint.reader import Checkpoint
from maestrale.checkpoint.rounding import int4_scales
from maestrale.errors import UsageError
from maestrale.torch_backend.load import as_torch
from maestrale.torch_backend.model import Block, RMSNorm, rope_turns
from maestrale.torch_backend.train.loss import packed_attend, packed_positions

LENGTH, SEQUENCES = 512, 128  # of the calibration text, at most
_DAMPING = 0.01  # of the mean of the Hessian's diagonal is added to it (section 3.3)
_BLOCK = 128  # inputs whose effect on all others is applied at once; a multiple of every group
_BATCH = 8  # sequences that run at once
_SAME_INPUT = {"attention.wk": "attention.wq", "attention.wv": "attention.wq", "w3": "w1"}  # a Hessian for both


class Calibrated:
    """A `Quantizer` (checkpoint/quantize.py): a model that is open, and text to measure it on.

    token_ids: of the text, without a begin-of-text token. UsageError where they are too few.
    """

    def __init__(self, source: Checkpoint, token_ids: list[int], bos_id: int):
        config = source.config
        length = min(LENGTH, config.max_position_embeddings or LENGTH)
        count = min(SEQUENCES, len(token_ids) // (length - 1))
        if count < _BATCH:
            raise UsageError(
                f"the calibration text has {len(token_ids):,} tokens; expected at least {_BATCH * (length - 1):,}"
            )
        self._source, self._config, self._layer = source, config, -1
        rows = torch.tensor(token_ids[: count * (length - 1)]).view(count, length - 1)
        ids_BL = torch.cat([torch.full((count, 1), bos_id), rows], dim=1)
        embeddings = as_torch(source.tensor("tok_embeddings.weight"))
        self._x_BLD = embeddings[ids_BL].float()
        self._block: nn.Module | None = None
        self._hessians: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, name: str, tensor: StoredTensor, format: str, group: int) -> PackedWeight:
        words = name.removesuffix(".weight").split(".")
        layer = int(words[1]) if words[0] == "layers" else self._config.n_layers
        if layer != self._layer:
            self._enter(layer)
        inside = ".".join(words[2:])
        shared = next(
            (inside.removesuffix(end) + same for end, same in _SAME_INPUT.items() if inside.endswith(end)), inside
        )
        weight = round_gptq(as_torch(tensor).float().numpy(), self._hessians[shared], format, group)
        if isinstance(self._block, Block):
            self._block.get_parameter(f"{inside}.weight").copy_(torch.from_numpy(dequantize(weight)))
        return weight

    def _enter(self, layer: int) -> None:
        """Takes the text through the layer just quantized, and measures the next, or what the head reads."""
        if isinstance(self._block, Block):
            self._run()
        self._layer, self._hessians = layer, {}
        if layer == self._config.n_layers:
            self._block = RMSNorm(self._config.dim, self._config.norm_eps)
            self._load("norm.")
            self._run()
            x_TD = self._x_BLD.flatten(0, 1)
            self._hessians[""] = 2 * x_TD.mT @ x_TD
            return
        self._block = Block(layer, self._config)
        self._load(f"layers.{layer}.")
        hooks = [
            module.register_forward_pre_hook(self._measure(name))
            for name, module in self._block.named_modules()
            if is_linear(f"{name}.weight") and not name.endswith(tuple(_SAME_INPUT))
        ]
        self._run(keep=False)
        for hook in hooks:
            hook.remove()

    def _load(self, prefix: str) -> None:
        assert self._block is not None
        names = [name for name in self._source.names() if name.startswith(prefix)]
        state = {name.removeprefix(prefix): as_torch(self._source.tensor(name)).float() for name in names}
        self._block.load_state_dict(state)
        self._block.requires_grad_(False)

    def _measure(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x_TK = inputs[0]
            self._hessians[name] = self._hessians.get(name, 0) + 2 * x_TK.mT @ x_TK

        return add

    def _run(self, keep: bool = True) -> None:
        """Every sequence through the block; its output becomes the text's new state where `keep` is set."""
        assert self._block is not None
        for start in range(0, len(self._x_BLD), _BATCH):
            x_BLD = self._x_BLD[start : start + _BATCH]
            x_TD = x_BLD.flatten(0, 1)
            if isinstance(self._block, Block):
                documents_BL = torch.zeros(x_BLD.shape[:2], dtype=torch.int64)
                turns_TP = rope_turns(packed_positions(documents_BL), self._config.head_dim, self._config.rope_theta)
                y_TD = self._block(x_TD, turns_TP, packed_attend(documents_BL, self._config.sliding_window))
            else:
                y_TD = self._block(x_TD)
            if keep:
                self._x_BLD[start : start + _BATCH] = y_TD.view(x_BLD.shape)


def round_gptq(values_NK: np.ndarray, hessian_KK: torch.Tensor, format: str, group: int) -> PackedWeight:
    """values float32 [N, K]; hessian: 2 Σ x xᵀ over the inputs x of the text, or 0 where none came."""
    w_NK = torch.from_numpy(values_NK.copy())
    n, k = w_NK.shape
    upper_KK = _inverse_factor(torch.as_tensor(hessian_KK), k)
    size, low, high = (k, -127, 127) if format == "int8" else (group, -MIDDLE, MIDDLE - 1)
    codes_NK = torch.empty(n, k)
    scales = torch.empty(n, k // size)
    if format == "int8":
        scales[:, 0] = w_NK.abs().amax(1) / 127
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        block, errors = w_NK[:, start:end], torch.empty(n, end - start)
        for i in range(end - start):
            column = start + i
            if format == "int4" and column % group == 0:
                # What the inputs before it have changed in the group is in it by now.
                chosen = int4_scales(block[:, i : i + group].numpy()[:, None])
                scales[:, column // group] = torch.from_numpy(chosen[:, 0].astype(np.float32))
            scale = scales[:, column // size]
            code = torch.where(scale == 0, 0, block[:, i] / scale).round().clamp(low, high)
            codes_NK[:, column] = code
            errors[:, i] = (block[:, i] - code * scale) / upper_KK[column, column]
            block[:, i:] -= errors[:, i : i + 1] * upper_KK[column, column:end]
        w_NK[:, end:] -= errors @ upper_KK[start:end, end:]
    if format == "int8":
        return pack_int8(codes_NK.numpy().astype(np.int8), scales[:, 0].numpy())
    return pack_int4((codes_NK + MIDDLE).numpy().astype(np.uint8), scales.numpy().astype(np.float16))


def _inverse_factor(hessian_KK: torch.Tensor, k: int) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, in float32."""
    hessian = hessian_KK.double() if hessian_KK.ndim else torch.zeros(k, k, dtype=torch.float64)
    diagonal = hessian.diagonal()
    diagonal += _DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1  # no input ever: rounding to nearest
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()
