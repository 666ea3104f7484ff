"""The one table of tensors: canonical name → shape and logical axes, as data.

Loaders check shapes against it, converters walk it, parallel ranks cut along its axes, `inspect` counts with it.
Canonical names are the native ones of params.json folders; experts stand one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from maestrale.config import ModelConfig

# A linear layer's weight is [out, in]. "heads" are query heads times head_dim, "kv_heads" likewise.
_TOP = {
    "tok_embeddings.weight": ("vocab", "dim"),
    "norm.weight": ("dim",),
    "output.weight": ("vocab", "dim"),
}
_LAYER = {
    "attention_norm.weight": ("dim",),
    "attention.wq.weight": ("heads", "dim"),
    "attention.wk.weight": ("kv_heads", "dim"),
    "attention.wv.weight": ("kv_heads", "dim"),
    "attention.wo.weight": ("dim", "heads"),
    "ffn_norm.weight": ("dim",),
}
_FEED_FORWARD = {
    "w1.weight": ("hidden", "dim"),
    "w2.weight": ("dim", "hidden"),
    "w3.weight": ("hidden", "dim"),
}
_GATE = {"feed_forward.gate.weight": ("experts", "dim")}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: its shape and, for each dimension, the logical axis that it runs along."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n


def tensor_plan(config: ModelConfig) -> dict[str, TensorPlan]:
    """Every tensor of a model, in file order. Tied embeddings have no `output.weight` of their own."""
    names = dict(_TOP)
    if config.tied_embeddings:
        del names["output.weight"]
    for i in range(config.n_layers):
        for name, axes in _LAYER.items():
            names[f"layers.{i}.{name}"] = axes
        if config.moe is None:
            for name, axes in _FEED_FORWARD.items():
                names[f"layers.{i}.feed_forward.{name}"] = axes
        else:
            for name, axes in _GATE.items():
                names[f"layers.{i}.{name}"] = axes
            for e in range(config.moe.num_experts):
                for name, axes in _FEED_FORWARD.items():
                    names[f"layers.{i}.feed_forward.experts.{e}.{name}"] = axes
    sizes = axis_sizes(config)
    return {name: TensorPlan(tuple(sizes[a] for a in axes), axes) for name, axes in names.items()}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "dim": config.dim,
        "heads": config.n_heads * config.head_dim,
        "kv_heads": config.n_kv_heads * config.head_dim,
        "hidden": config.hidden_dim,
        "experts": config.moe.num_experts if config.moe else 0,
    }


def explain_axis(config: ModelConfig, axis: str) -> str:
    """Which words of params.json an axis's extent follows from, for error messages."""
    return {
        "vocab": f"vocab_size = {config.vocab_size}",
        "dim": f"dim = {config.dim}",
        "heads": f"n_heads = {config.n_heads}, head_dim = {config.head_dim}",
        "kv_heads": f"n_kv_heads = {config.n_kv_heads}, head_dim = {config.head_dim}",
        "hidden": f"hidden_dim = {config.hidden_dim}",
        "experts": f"moe.num_experts = {config.moe.num_experts if config.moe else 0}",
    }[axis]


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those that one token's step uses): they differ in a mixture of experts only."""
    plan = tensor_plan(config)
    total = sum(t.size for t in plan.values())
    if config.moe is None:
        return total, total
    experts = sum(t.size for name, t in plan.items() if ".experts." in name)
    return total, total - experts // config.moe.num_experts * (config.moe.num_experts - config.moe.num_experts_per_tok)


def cache_bytes(config: ModelConfig, length: int, element_bytes: float) -> int:
    """Bytes of keys and values that one sequence of `length` tokens must keep: a windowed layer keeps its window."""
    kept = sum(min(length, w) if w else length for w in config.sliding_window)
    return round(kept * 2 * config.n_kv_heads * config.head_dim * element_bytes)
