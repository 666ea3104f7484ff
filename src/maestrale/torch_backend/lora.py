"""Low-rank adapters put around a finished model's linear layers, from outside: the model file knows nothing of them.

Layers are named as in the reference: `layers.0.attention.wq.lora_A.weight` (LoRA, arXiv 2106.09685; with a magnitude
for each output it is DoRA, arXiv 2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from maestrale.checkpoint.adapter import Adapter, Delta, linear_layers
from maestrale.config import ModelConfig
from maestrale.errors import UsageError

# Words for groups of layers → the ends of their names.
GROUPS = {
    "attention": ("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    "ffn": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "experts": ("w1", "w2", "w3"),
    "router": ("feed_forward.gate",),
    "head": ("output",),
}


class LoraLinear(nn.Module):
    """x → base(x) + scale * lora_B(lora_A(x)), and base(x) alone while not `active`.

    base: a linear layer, or what has its weight and sizes; it stays as it is. Adapter weights are fp32. With a
    magnitude each output is that sum times magnitude / |row of W + scale * B A|; the norm takes no part in the
    gradient (DoRA, section 4.3).
    """

    def __init__(self, base: Any, rank: int, scale: float, dora: bool):
        super().__init__()
        self.base, self.scale, self.active = base, scale, True
        self.in_features, self.out_features = base.in_features, base.out_features
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        self.magnitude = nn.Parameter(self._row_norms()) if dora else None

    def reset(self, generator: torch.Generator) -> None:
        """As an adapter begins: A uniform in ±1 / sqrt(in), B zero, so that the sum is the base's alone."""
        bound = 1 / math.sqrt(self.lora_A.in_features)
        nn.init.uniform_(self.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B.weight)
        if self.magnitude is not None:
            self.magnitude.data.copy_(self._row_norms())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.active:
            return y
        y = y + self.scale * self.lora_B(self.lora_A(x))
        return y if self.magnitude is None else (self.magnitude / self._row_norms()).to(y.dtype) * y

    @torch.no_grad()
    def _row_norms(self) -> torch.Tensor:
        """|row of W + scale * B A|, fp32 [out]."""
        return (self.base.weight.float() + self.scale * self.lora_B.weight @ self.lora_A.weight).norm(dim=1)

    def delta(self, whole: Callable[[torch.Tensor], torch.Tensor]) -> Delta:
        """whole: puts a parameter together that is cut over ranks."""
        a, b = (whole(part.weight).detach().cpu().numpy() for part in (self.lora_A, self.lora_B))
        magnitude = None if self.magnitude is None else whole(self.magnitude).detach().cpu().numpy()
        return Delta(a, b, self.scale, magnitude)


def target_layers(config: ModelConfig, targets: Sequence[str]) -> list[str]:
    """The linear layers that words name: a word of GROUPS, or the end of a layer's own name (wq, attention.wq).

    UsageError for a word that names none in this model.
    """
    names, found = list(linear_layers(config)), set()
    for word in targets:
        ends = GROUPS.get(word, (word,))
        inside = ".experts." if word == "experts" else ""
        named = {n for n in names if inside in n and any(n == end or n.endswith(f".{end}") for end in ends)}
        if word == "ffn":
            named = {n for n in named if ".experts." not in n}
        if not named:
            raise UsageError(
                f"targets: {word!r} names no linear layer of this model; expected some of {', '.join(GROUPS)}, or the "
                "end of a layer's name, such as wq"
            )
        found |= named
    return [name for name in names if name in found]


def add_lora(model: nn.Module, names: Sequence[str], rank: int, scale: float, dora: bool, seed: int) -> None:
    """Puts an adapter around each of these layers, freshly drawn; all that can learn afterwards is in them."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer = LoraLinear(model.get_submodule(name), rank, scale, dora)
        layer.reset(generator)
        model.set_submodule(name, layer)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def to_adapter(
    model: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter
) -> Adapter:
    """What has been learnt, ready to be written."""
    return Adapter({name: layer.delta(whole) for name, layer in lora_layers(model).items()}, "this run")


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base model as it was, at no cost of memory."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
