"""Tiny random models for all tests, as transformers makes them and as native folders, and a tokenizer of letters.

Nothing here uses the package's own writer, converter or `to_hf`: names and rows are translated by the formulas of
docs/numerics.md once more. Weights are drawn so that logits are of order 1 and attention is far from uniform.
"""

import base64
import json
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from maestrale.config import ModelConfig, MoeConfig
from maestrale.text.tokenizer import Tokenizer
from maestrale.text.vocabulary import Pieces, Vocabulary

transformers.utils.logging.disable_progress_bar()

CONTROLS = (  # after unk, bos and eos
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)

DENSE = ModelConfig(
    dim=32,
    n_layers=2,
    head_dim=8,
    hidden_dim=48,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=(None, None),
)
WINDOWED = replace(DENSE, sliding_window=(5, 5))
MIXED = replace(DENSE, n_layers=3, sliding_window=(None, 5, 5))
MIXTURE = replace(DENSE, rope_theta=1e6, moe=MoeConfig(num_experts=4, num_experts_per_tok=2))
TIED = replace(DENSE, tied_embeddings=True, n_kv_heads=1, head_dim=12)
MODELS = {"dense": DENSE, "windowed": WINDOWED, "mixed": MIXED, "mixture": MIXTURE, "tied": TIED}


def hf_model(config: ModelConfig, seed: int = 0, gain: float = 1.5) -> transformers.PreTrainedModel:
    """A random transformers model in float32 with the numbers of `config`, frozen. gain: of query and key weights."""
    windows = set(config.sliding_window)
    shared = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_position_embeddings or 512,
        "sliding_window": max((w for w in windows if w), default=None),
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.device("meta"):
        if config.moe:
            model = transformers.MixtralForCausalLM(
                transformers.MixtralConfig(
                    **shared,
                    experts_implementation="eager",  # the fused one takes only sizes that are multiples of 4
                    num_local_experts=config.moe.num_experts,
                    num_experts_per_tok=config.moe.num_experts_per_tok,
                )
            )
        elif len(windows) > 1:
            kinds = ["sliding_attention" if w else "full_attention" for w in config.sliding_window]
            model = transformers.MinistralForCausalLM(transformers.MinistralConfig(**shared, layer_types=kinds))
        else:
            model = transformers.MistralForCausalLM(transformers.MistralConfig(**shared))
    return fill(model, seed, gain)


def fill(model: torch.nn.Module, seed: int, gain: float) -> torch.nn.Module:
    """Gives the parameters of a model on the meta device their memory and random values."""
    model = model.to_empty(device="cpu")
    for module in model.modules():  # tables that are computed when a model is made
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    model.tie_weights()
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=draw)
        if weight.ndim == 1:
            values = 1 + 0.1 * values
        elif "embed_tokens" not in name or model.config.tie_word_embeddings:
            values *= weight.shape[-1] ** -0.5 * (gain if "q_proj" in name or "k_proj" in name else 1)
        weight.data.copy_(values)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def hf_logits(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Float32 [T, vocab] from one full forward pass without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def hf_greedy(
    model: transformers.PreTrainedModel, ids: list[int], count: int, banned: tuple[int, ...] = ()
) -> list[int]:
    """The `count` likeliest next tokens, by a full forward pass for each: `generate` and its cache are not trusted."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        logits = hf_logits(model, ids)[-1]
        logits[list(banned)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[start:]


def native_weights(model: transformers.PreTrainedModel, config: ModelConfig) -> dict[str, torch.Tensor]:
    """A transformers model's weights by native name, rows of q and k in interleaved order."""
    weights = {"tok_embeddings.weight": model.model.embed_tokens.weight, "norm.weight": model.model.norm.weight}
    if not config.tied_embeddings:
        weights["output.weight"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        attention, prefix = layer.self_attn, f"layers.{i}."
        weights[prefix + "attention_norm.weight"] = layer.input_layernorm.weight
        weights[prefix + "ffn_norm.weight"] = layer.post_attention_layernorm.weight
        weights[prefix + "attention.wq.weight"] = _interleaved(attention.q_proj.weight, config.head_dim)
        weights[prefix + "attention.wk.weight"] = _interleaved(attention.k_proj.weight, config.head_dim)
        weights[prefix + "attention.wv.weight"] = attention.v_proj.weight
        weights[prefix + "attention.wo.weight"] = attention.o_proj.weight
        prefix += "feed_forward."
        if config.moe is None:
            for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                weights[f"{prefix}{ours}.weight"] = getattr(layer.mlp, theirs).weight
            continue
        weights[prefix + "gate.weight"] = layer.mlp.gate.weight
        for e in range(config.moe.num_experts):
            w1, w3 = layer.mlp.experts.gate_up_proj[e].chunk(2)
            for name, weight in (("w1", w1), ("w2", layer.mlp.experts.down_proj[e]), ("w3", w3)):
                weights[f"{prefix}experts.{e}.{name}.weight"] = weight
    return {name: weight.detach().contiguous().clone() for name, weight in weights.items()}


def _interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_native(folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor], **changes: object) -> Path:
    """A folder of params.json and consolidated.safetensors. changes: keys of params.json put over the config's own."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {name: getattr(config, name) for name in ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads")}
    params |= {name: getattr(config, name) for name in ("n_kv_heads", "vocab_size", "norm_eps", "rope_theta")}
    params |= {"sliding_window": list(config.sliding_window), "tied_embeddings": config.tied_embeddings}
    params["max_position_embeddings"] = config.max_position_embeddings or 512
    if config.moe:
        moe = config.moe
        params["moe"] = {"num_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok}
    (folder / "params.json").write_text(json.dumps(params | changes))
    save_file(weights, folder / "consolidated.safetensors")
    return folder


def make_folder(folder: Path, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A random native folder."""
    weights = native_weights(hf_model(config, seed), config)
    return write_native(folder, config, {name: weight.to(dtype) for name, weight in weights.items()})


def tokens(count: int, vocab_size: int = 64, seed: int = 0) -> list[int]:
    """Random ids; none below 3, which are control tokens of `letters`."""
    return torch.randint(3, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def letters(vocab_size: int = 64) -> Tokenizer:
    """unk 0, bos 1, eos 2, then a byte a token, from the space on: id 3 + i is chr(32 + i); of the last two of all
    ids the one begins and the other ends "é"."""
    shown = [None, None, None, *(bytes([32 + i]) for i in range(vocab_size - 5)), b"\xc3", b"\xa9"]
    return Tokenizer(
        Vocabulary(
            kind="v1",
            chat_version=None,
            bos_id=1,
            eos_id=2,
            controls={},
            pieces=Pieces(shown=shown, opening={}, errors="replace", control_breaks=False),
            encode_text=lambda text: [3 + ord(letter) - 32 for letter in text],
            path=Path("letters"),
        )
    )


def write_tekken(folder: Path) -> int:
    """A tekken.json of single bytes after 32 control tokens; gives its vocabulary's size."""
    size = 256 + 32
    names = ["<unk>", "<s>", "</s>", *CONTROLS, *(f"<{i}>" for i in range(12))]
    content = {
        "config": {
            "pattern": r"\p{L}+|\s+|[^\s\p{L}]+",
            "num_vocab_tokens": 256,
            "default_vocab_size": size,
            "default_num_special_tokens": 32,
            "version": "v7",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)
        ],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)],
    }
    (folder / "tekken.json").write_text(json.dumps(content))
    return size
