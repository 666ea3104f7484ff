"""What a model is: the numbers that its folder's params.json (or config.json) states.

Names are params.json's; Hugging Face's are translated here and nowhere else. Defaults where the files are
silent are rules N1 and N2 of docs/numerics.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maestrale.errors import ConfigError, shown
from maestrale.values import MAX_SIZE, ValueReader, whole

DEFAULT_CONTEXT = 32_768  # where a model's folder does not say; the length Mistral 7B was trained to use
MAX_LAYERS = 1000  # these two bound the table of tensors, which is built before any weight is looked at
MAX_EXPERTS = 20_000  # in all layers together


@dataclass(frozen=True)
class MoeConfig:
    """A sparse mixture: each token goes to `num_experts_per_tok` of `num_experts` experts."""

    num_experts: int
    num_experts_per_tok: int


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only Mistral or Mixtral model.

    `sliding_window` has one entry for each layer: the number of keys a query sees, itself included, or None.
    `max_position_embeddings` is the longest context the model was made for; None where its folder does not say.
    Construction checks every value and raises ConfigError.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    sliding_window: tuple[int | None, ...]
    moe: MoeConfig | None = None
    tied_embeddings: bool = False
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size"):
            whole(name, getattr(self, name), limit=MAX_LAYERS if name == "n_layers" else MAX_SIZE)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim = {self.head_dim}: must be even, RoPE turns its entries in pairs")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}: "
                "each key/value head serves n_heads / n_kv_heads query heads"
            )
        if not (0 < self.norm_eps < 1):
            raise ConfigError(f"norm_eps = {self.norm_eps}: must lie between 0 and 1")
        if not (1 <= self.rope_theta < math.inf):
            raise ConfigError(f"rope_theta = {self.rope_theta}: must be a finite number of at least 1")
        if len(self.sliding_window) != self.n_layers:
            raise ConfigError(f"sliding_window has {len(self.sliding_window)} entries for {self.n_layers} layers")
        for window in self.sliding_window:
            if window is not None:
                whole("sliding_window", window)
        if self.max_position_embeddings is not None:
            whole("max_position_embeddings", self.max_position_embeddings)
        if self.moe is not None:
            whole("moe.num_experts", self.moe.num_experts, limit=MAX_EXPERTS // self.n_layers)
            whole("moe.num_experts_per_tok", self.moe.num_experts_per_tok)
            if self.moe.num_experts_per_tok > self.moe.num_experts:
                raise ConfigError(
                    f"moe.num_experts_per_tok = {self.moe.num_experts_per_tok} is more than "
                    f"moe.num_experts = {self.moe.num_experts}"
                )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The kinds of layer: the distinct windows, in order of first appearance. Each kind has its own pages."""
        return tuple(dict.fromkeys(self.sliding_window))

    @classmethod
    def from_mistral(cls, params: Mapping[str, Any], source: str = "params.json") -> ModelConfig:
        """From the keys of a params.json. Errors name key, value and `source`; unknown keys are warned of by name."""
        reader = ValueReader(params, source)
        for key in ("vision_encoder", "mamba", "ssm_cfg", "audio_encoder", "multimodal"):
            reader.refuse(key, "text models only")
        for key in ("yarn", "rope_scaling", "llama_4_scaling", "use_biases", "attn_bias", "q_lora_rank"):
            reader.refuse(key, "not supported")
        for key in ("quantization", "quantization_config"):
            reader.refuse(key, "quantized weights are not supported")
        if reader.get("causal", True) is not True:
            raise ConfigError(f"{source}: causal = {shown(params['causal'])}: only causal models are supported")
        n_layers = reader.whole("n_layers", limit=MAX_LAYERS)
        pattern = reader.get("sliding_window", reader.get("_sliding_window"))
        windows = _tile_windows(pattern, n_layers, source)
        theta = reader.number("rope_theta", 1e4 if any(windows) else 1e6)  # N1
        moe = None
        if (section := reader.get("moe")) is not None:
            moe_reader = ValueReader(reader.mapping("moe", section), source, "moe.")
            moe = MoeConfig(moe_reader.whole("num_experts"), moe_reader.whole("num_experts_per_tok"))
            moe_reader.warn_unknown()
        dim, n_heads = reader.whole("dim"), reader.whole("n_heads")
        config = reader.build(
            cls,
            dim=dim,
            n_layers=n_layers,
            head_dim=reader.whole("head_dim", _quotient(dim, n_heads)),
            hidden_dim=reader.whole("hidden_dim"),
            n_heads=n_heads,
            n_kv_heads=reader.whole("n_kv_heads", n_heads),
            vocab_size=reader.whole("vocab_size"),
            norm_eps=reader.number("norm_eps", 1e-5),
            rope_theta=theta,
            sliding_window=windows,
            moe=moe,
            tied_embeddings=reader.flag("tied_embeddings"),
            max_position_embeddings=reader.optional_whole("max_position_embeddings", "max_seq_len"),
        )
        reader.warn_unknown("model_type", "max_batch_size", "use_cache")  # known, and nothing follows from them
        return config

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """From the keys of a Hugging Face config.json of type mistral, ministral or mixtral."""
        reader = ValueReader(config, source)
        model_type = reader.get("model_type")
        if reader.get("vision_config") is not None or reader.get("text_config") is not None:
            raise ConfigError(f"{source}: a model with vision or several towers; this program runs text models only")
        if model_type not in ("mistral", "ministral", "mixtral"):
            raise ConfigError(
                f"{source}: model_type = {shown(model_type)}; expected mistral, ministral or mixtral (text models only)"
            )
        reader.refuse("quantization_config", "it describes the weights, not the model: open the whole folder")
        if reader.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{source}: hidden_act = {shown(reader.get('hidden_act'))}; expected 'silu'")
        mixture = model_type == "mixtral"
        rope = reader.get("rope_parameters") or {}
        for name, asked in (("rope_parameters", rope), ("rope_scaling", reader.get("rope_scaling") or {})):
            if reader.mapping(name, asked).get("rope_type", asked.get("type", "default")) != "default":
                raise ConfigError(f"{source}: {name} = {shown(dict(asked))}; only rope_type 'default' is supported")
            rope = rope or asked
        theta = rope.get("rope_theta", reader.get("rope_theta"))
        n_layers, dim, n_heads = (
            reader.whole("num_hidden_layers", limit=MAX_LAYERS),
            reader.whole("hidden_size"),
            reader.whole("num_attention_heads"),
        )
        windows = _hf_windows(reader, n_layers, mixture)
        moe = None
        if mixture:
            moe = MoeConfig(reader.whole("num_local_experts", 8), reader.whole("num_experts_per_tok", 2))
            if windows[0] == 4096 and (dim, n_layers, moe.num_experts) == (4096, 32, 8):
                warnings.warn(
                    f"{source}: sliding_window = 4096 is a known mistake in early Mixtral 8x7B configs; using none",
                    stacklevel=2,
                )
                windows = (None,) * n_layers
        found = reader.build(
            cls,
            dim=dim,
            n_layers=n_layers,
            head_dim=reader.whole("head_dim", _quotient(dim, n_heads)),
            hidden_dim=reader.whole("intermediate_size"),
            n_heads=n_heads,
            # null means one for each query head; where the key is absent, the config class's default is 8
            n_kv_heads=reader.whole("num_key_value_heads", n_heads if "num_key_value_heads" in config else 8),
            vocab_size=reader.whole("vocab_size"),
            norm_eps=reader.number("rms_norm_eps", 1e-5 if mixture else 1e-6),  # N2: the config class's defaults
            rope_theta=reader.as_number("rope_theta", theta, 1e6 if mixture else 1e4),
            sliding_window=windows,
            moe=moe,
            tied_embeddings=reader.flag("tie_word_embeddings"),
            max_position_embeddings=reader.optional_whole("max_position_embeddings"),
        )
        reader.warn_unknown(*_HF_SILENT)
        return found

    def to_mistral(self) -> dict[str, Any]:
        """The keys of params.json, so that `from_mistral(c.to_mistral()) == c`."""
        params: dict[str, Any] = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "head_dim": self.head_dim,
            "hidden_dim": self.hidden_dim,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "norm_eps": self.norm_eps,
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_theta,
        }
        if len(self.windows) > 1:
            params["sliding_window"] = list(self.sliding_window)
        elif self.windows[0] is not None:
            params["sliding_window"] = self.windows[0]
        if self.moe is not None:
            params["moe"] = {
                "num_experts_per_tok": self.moe.num_experts_per_tok,
                "num_experts": self.moe.num_experts,
            }
        if self.tied_embeddings:
            params["tied_embeddings"] = True
        if self.max_position_embeddings is not None:
            params["max_position_embeddings"] = self.max_position_embeddings
        return params

    def to_hf(self, dtype: str = "bfloat16", bos_id: int = 1, eos_id: int = 2) -> dict[str, Any]:
        """The keys of config.json as transformers 5 reads them; ConfigError where it has no words for this model.

        bos_id, eos_id: the tokenizer's, which params.json does not state."""
        model_type = "mixtral" if self.moe else "ministral" if len(self.windows) > 1 else "mistral"
        config: dict[str, Any] = {
            "architectures": [model_type.capitalize() + "ForCausalLM"],
            "model_type": model_type,
            "attention_dropout": 0.0,
            "bos_token_id": bos_id,
            "dtype": dtype,
            "eos_token_id": eos_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "initializer_range": 0.02,
            "intermediate_size": self.hidden_dim,
            "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,  # for transformers 4, which does not read rope_parameters
            "sliding_window": self.windows[0],
            "tie_word_embeddings": self.tied_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        if self.max_position_embeddings is not None:
            config["max_position_embeddings"] = self.max_position_embeddings
        if len(self.windows) > 1:
            sizes = {w for w in self.windows if w is not None}
            if len(sizes) > 1 or self.moe:
                raise ConfigError(
                    f"sliding_window = {list(self.sliding_window)}: config.json has words for one window size and "
                    "full layers in a dense model only; keep the native layout"
                )
            config["sliding_window"] = sizes.pop()
            config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.sliding_window]
        if self.moe is not None:
            config["num_local_experts"] = self.moe.num_experts
            config["num_experts_per_tok"] = self.moe.num_experts_per_tok
        return config


_HF_SILENT = (
    # Keys of config.json that say nothing about inference of these models, or that the library writes on its own.
    *("architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"),
    *("transformers_version", "use_cache", "initializer_range", "_name_or_path", "output_router_logits"),
    *("router_aux_loss_coef", "router_jitter_noise", "pretraining_tp", "attention_bias", "max_window_layers"),
    *("output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "mlp_bias", "tokenizer_class", "auto_map"),
)


def _hf_windows(reader: ValueReader, n_layers: int, mixture: bool) -> tuple[int | None, ...]:
    window = reader.get("sliding_window") if "sliding_window" in reader.values or mixture else 4096
    windows = _tile_windows(window, n_layers, reader.source)
    types = reader.get("layer_types")
    if types is None:
        return windows
    if not isinstance(types, list) or len(types) != n_layers:
        raise ConfigError(f"{reader.source}: layer_types must be a list of {n_layers} entries, got {shown(types)}")
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise ConfigError(f"{reader.source}: layer_types holds {shown(kind)}; expected sliding_ or full_attention")
    return tuple(w if kind == "sliding_attention" else None for w, kind in zip(windows, types, strict=True))


def _tile_windows(pattern: Any, n_layers: int, source: str) -> tuple[int | None, ...]:
    """A window as the files spell it (null, int, numeric string, list of those) → one entry for each layer."""
    items = pattern if isinstance(pattern, list) else [pattern]
    if not items:
        raise ConfigError(f"{source}: sliding_window = []: expected at least one entry")
    windows: list[int | None] = []
    for item in items:
        if isinstance(item, str):
            text = item.strip()
            if not text.isascii() or not text.isdigit() or len(text) > 10:
                raise ConfigError(f"{source}: sliding_window = {shown(item)}: expected a whole number or null")
            item = int(text)
        windows.append(None if item is None else whole("sliding_window", item, source))
    if len(windows) > n_layers or n_layers % len(windows):
        raise ConfigError(f"{source}: sliding_window has {len(windows)} entries, which do not tile {n_layers} layers")
    return tuple(windows[i % len(windows)] for i in range(n_layers))


def _quotient(dim: int, n_heads: int) -> int | None:
    return dim // n_heads if dim % n_heads == 0 else None
