"""Hugging Face folders of Mistral and Mixtral: their names, and the order of rows in q_proj and k_proj.

Their rotary embedding turns entry i with entry i + head_dim / 2 where the native one turns 2i with 2i + 1, so the
rows of each head stand in another order: evens first, then odds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial

from numpy.typing import NDArray

from maestrale.checkpoint.place import Place, expert_of, same_place
from maestrale.config import ModelConfig
from maestrale.plan import axis_sizes, tensor_plan

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # a table that is computed, not learned

# Native → Hugging Face, without ".weight": outside of layers, then inside of one.
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}


def hf_name(name: str) -> str:
    """A canonical name → the one that Hugging Face's files have."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, layer, rest = stem.split(".", 2)
    inside = _LAYER.get(rest) or rest.replace("feed_forward.experts.", "block_sparse_moe.experts.")
    return f"model.layers.{layer}.{inside}.weight"


def to_hf_rows(array: NDArray, head_dim: int) -> NDArray:
    """[heads * head_dim, dim]: the rows of each head from pairs (2i, 2i + 1) to halves (i, i + head_dim / 2)."""
    return array.reshape(-1, head_dim // 2, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def to_native_rows(array: NDArray, head_dim: int) -> NDArray:
    """The inverse of `to_hf_rows`."""
    return array.reshape(-1, 2, head_dim // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def has_permuted_rows(name: str) -> bool:
    """Whether a canonical tensor's rows stand in another order in Hugging Face's files."""
    return name.endswith((".wq.weight", ".wk.weight"))


def places(config: ModelConfig, stored: Collection[str]) -> dict[str, Place]:
    """Canonical name → where it is, in the layout that the stored names show: experts one by one, or fused."""
    fused = any(".mlp.experts." in name for name in stored)
    found = {}
    for name, tensor in tensor_plan(config).items():
        if fused and ".experts." in name:
            found[name] = _fused_expert(config, name)
        elif fused and name.endswith(".feed_forward.gate.weight"):
            found[name] = same_place(hf_name(name).replace("block_sparse_moe", "mlp"), tensor)
        else:
            select = partial(to_native_rows, head_dim=config.head_dim) if has_permuted_rows(name) else None
            found[name] = same_place(hf_name(name), tensor, select)
    return found


def _fused_expert(config: ModelConfig, name: str) -> Place:
    """gate_up_proj [experts, 2 * hidden, dim] is w1 then w3; down_proj [experts, dim, hidden] is w2."""
    layer, expert, matrix = expert_of(name)
    sizes = axis_sizes(config)
    experts, hidden, dim = sizes["experts"], sizes["hidden"], sizes["dim"]
    select: Callable[[NDArray], NDArray]
    if matrix == "w2":
        stored, shape = "down_proj", (experts, dim, hidden)
        axes: tuple[tuple[str, ...], ...] = (("experts",), ("dim",), ("hidden",))
        rows = slice(dim)
    else:
        stored, shape = "gate_up_proj", (experts, 2 * hidden, dim)
        axes = (("experts",), ("hidden",), ("dim",))
        rows = slice(hidden) if matrix == "w1" else slice(hidden, 2 * hidden)
    select = partial(_part, expert=expert, rows=rows)
    return Place(f"model.{layer}mlp.experts.{stored}", shape, axes, select)


def _part(array: NDArray, expert: int, rows: slice) -> NDArray:
    return array[expert, rows]
