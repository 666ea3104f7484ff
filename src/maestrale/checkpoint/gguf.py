"""GGUF files of Mistral and Mixtral models: their names and header values, and where the canonical tensors are.

llama.cpp turns pairs (2i, 2i + 1) in its "llama" architecture, so rows of q and k stand in native order. Source: the
names in gguf-py/gguf/constants.py of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.gguf_blocks import BLOCKS, PACKED, read_blocks
from maestrale.checkpoint.gguf_room import GgufFile
from maestrale.checkpoint.packed import PackedWeight
from maestrale.checkpoint.packed_room import is_linear
from maestrale.checkpoint.place import Part, Place, QuantizedPlace, expert_of
from maestrale.config import DEFAULT_CONTEXT, ModelConfig
from maestrale.errors import CheckpointError, ConfigError
from maestrale.plan import TensorPlan, explain_axis, tensor_plan

ARCHITECTURE = "llama"
IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd")  # a table that is computed, not learned
_TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "feed_forward.gate": "ffn_gate_inp",
}


def gguf_name(name: str) -> str:
    """A canonical name → a file's; all experts of a layer are one tensor [experts, n, k]."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, layer, rest = stem.split(".", 2)
    if ".experts." in rest:
        return f"blk.{layer}.{_LAYER['feed_forward.' + rest[-2:]]}_exps.weight"
    return f"blk.{layer}.{_LAYER[rest]}.weight"


def read_config(file: GgufFile) -> ModelConfig:
    """The model that the header describes; ConfigError or CheckpointError where it is none that runs here."""
    values, where = file.values, f"{file.path} (header)"
    if values.get("general.architecture") != ARCHITECTURE:
        found = str(values.get("general.architecture"))[:40]
        raise ConfigError(
            f"{where}: general.architecture = {found!r}; expected {ARCHITECTURE!r}, as Mistral and Mixtral have it"
        )
    if (parts := values.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(f"{where}: one of {str(parts)[:40]} parts; join them with  llama-gguf-split --merge")

    def get(key: str, default: Any = None) -> Any:
        value = values.get(f"{ARCHITECTURE}.{key}", default)
        if isinstance(value, np.ndarray):
            raise ConfigError(f"{where}: {ARCHITECTURE}.{key} differs between layers; expected one number")
        return value

    if get("rope.scaling.type", "none") != "none" and get("rope.scaling.factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: {ARCHITECTURE}.rope.scaling is set: not supported")
    dim, n_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", dim // n_heads if type(dim) is type(n_heads) is int and n_heads else None)
    for key in ("rope.dimension_count", "attention.value_length"):
        if get(key, head_dim) != head_dim:
            raise ConfigError(f"{where}: {ARCHITECTURE}.{key} = {get(key)}; expected the head's size, {head_dim}")
    params = {
        "dim": dim,
        "n_layers": get("block_count"),
        "head_dim": head_dim,
        "hidden_dim": get("feed_forward_length"),
        "n_heads": n_heads,
        "n_kv_heads": get("attention.head_count_kv", n_heads),
        "norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "vocab_size": get("vocab_size", file.shapes.get("token_embd.weight", (None,))[0]),
        "rope_theta": _decimal(get("rope.freq_base", 10000.0)),
        "sliding_window": get("attention.sliding_window") or None,
        "tied_embeddings": "output.weight" not in file.entries,
        "max_position_embeddings": get("context_length"),
    }
    if get("expert_count", 0):
        params["moe"] = {"num_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count")}
    return ModelConfig.from_mistral(params, where)


def _decimal(value: Any) -> Any:
    """A float that was stored in 32 bits as people wrote it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`: header values without their prefix; of a window, the one that all layers have."""
    values = {
        "context_length": config.max_position_embeddings or DEFAULT_CONTEXT,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.hidden_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.moe:
        values |= {"expert_count": config.moe.num_experts, "expert_used_count": config.moe.num_experts_per_tok}
    if len(config.windows) == 1 and config.windows[0]:
        values["attention.sliding_window"] = config.windows[0]
    return values


def places(config: ModelConfig, file: GgufFile) -> dict[str, Place | QuantizedPlace]:
    """Canonical name → where it is. A name that the file lacks is left to the reader to miss."""
    return {name: _place(name, tensor, config, file) for name, tensor in tensor_plan(config).items()}


def _place(name: str, tensor: TensorPlan, config: ModelConfig, file: GgufFile) -> Place | QuantizedPlace:
    stored, shape, axes, expert = gguf_name(name), tensor.shape, tensor.axes, None
    if ".experts." in name:
        _, expert, _ = expert_of(name)
        single = f"{stored.removesuffix('_exps.weight')}.{expert}.weight"
        if single in file.entries:  # older files keep experts one by one
            stored, expert = single, None
        else:
            assert config.moe is not None
            shape, axes = (config.moe.num_experts, *shape), ("experts", *axes)
    kind = file.types.get(stored, "F32")
    if stored in file.shapes and file.shapes[stored] != shape:
        words = ", ".join(explain_axis(config, axis) for axis in axes)
        raise CheckpointError(
            f"{stored} in {file.path.name}: expected {shape}, got {file.shapes[stored]}; its header says {words}"
        )
    if kind not in BLOCKS:
        select = None if expert is None else partial(_expert, expert=expert)
        return Place(stored, shape, tuple((axis,) for axis in axes), select)
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{stored} in {file.path.name}: {kind}; expected F32, F16 or BF16 for a norm")
    size, width = BLOCKS[kind]
    part = Part(stored, ("U8",), (*shape[:-1], shape[-1] // size, width))
    return QuantizedPlace(
        kind,
        tensor.shape,
        (part,),
        8 * width / size,
        "int4" if kind in PACKED and is_linear(name) else None,
        partial(_read, kind=kind, expert=expert),
    )


def _expert(array: NDArray, expert: int) -> NDArray:
    return array[expert]


def _read(arrays: list[NDArray], kind: str, expert: int | None) -> PackedWeight | NDArray[np.float32]:
    return read_blocks(kind, arrays[0] if expert is None else arrays[0][expert])
