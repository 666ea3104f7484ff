"""Mistral and Mixtral in one file: load a folder, run the model, write text. Nothing else of this package is used.

    python -m maestrale.one_file PATH -p "This is a test" --max-tokens 35

Read it from the top. One sequence at a time, on the CPU, by the plainest formulas: a measure for faster programs.

A model is a stack of equal layers over a stream of vectors, one for each token. Each layer adds two things to the
stream: what attention fetches from earlier tokens, and what a feed-forward network makes of the token alone. In
Mixtral that network is a choice of a few experts out of many. The last layer's vectors, compared with one vector for
each word of the vocabulary, score the next token. A name's suffix spells its tensor's shape:

    T tokens of this step     D dim, the stream's width     C head_dim     S slots of the cache     V vocabulary
    H query heads             G key/value heads             R = H / G      E experts, of which K are chosen
"""

import argparse
import json
import pickle
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import torch
    from mistral_common.tokens.tokenizers import sentencepiece, tekken
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import Tensor, nn
except ImportError as missing:
    sys.exit(f"error: {missing}; run  pip install torch safetensors 'mistral-common[sentencepiece]'")

DEMO = ["This is a test", "This is another great test", "This is a third test, mistral AI is very good at testing. "]
WEIGHTS = ["consolidated.safetensors", "consolidated.00.pth"]  # the first one found is read


class Mistake(Exception):
    """Something about the model's folder that its user can put right; the message says what, in one line."""


@dataclass(frozen=True)
class Params:
    """The numbers of a params.json. `windows` has one entry a layer: the keys that a query sees, or None for all."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    rope_theta: float
    windows: tuple[int | None, ...]
    norm_eps: float = 1e-5
    num_experts: int = 0  # one dense feed-forward network
    num_experts_per_tok: int = 0
    tied_embeddings: bool = False


def read_params(file: Path) -> Params:
    """The numbers in `file`. Raises Mistake where one is missing or impossible; warns of keys that it does not know."""
    try:
        raw = {key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if value is not None}
        # A window is 4096, "4096" or a list with nulls, which is repeated over the layers; and it has two names.
        window = raw.pop("sliding_window", raw.pop("_sliding_window", None))
        pattern = [None if w is None else int(w) for w in (window if isinstance(window, list) else [window])]
        defaults = {
            "windows": tuple(pattern[i % len(pattern)] for i in range(raw["n_layers"])),
            "head_dim": raw["dim"] // raw["n_heads"],  # only where it is not said: Nemo says 128, for 5120 / 32
            "n_kv_heads": raw["n_heads"],
            "rope_theta": 1e4 if any(pattern) else 1e6,  # 7B v0.1, the windowed one, does not say that it needs 1e4
        }
        values = defaults | raw.pop("moe", {}) | raw
        p = Params(**{name: values.pop(name) for name in Params.__dataclass_fields__ if name in values})
        sizes = [p.dim, p.n_layers, p.head_dim, p.hidden_dim, p.n_heads, p.n_kv_heads, p.vocab_size]
        whole = all(type(n) is int and n > 0 for n in sizes + [w for w in p.windows if w is not None])
        experts_fit = bool(p.num_experts) <= p.num_experts_per_tok <= p.num_experts
        if not whole or p.n_heads % p.n_kv_heads or p.head_dim % 2 or not experts_fit:
            raise ValueError(f"sizes above 0, n_heads = i * n_kv_heads, head_dim even, enough experts are needed: {p}")
    except KeyError as error:
        raise Mistake(f"{file}: {error} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise Mistake(f"{file}: {error}") from None
    if unknown := sorted(values.keys() - {"max_position_embeddings", "max_seq_len", "model_type"}):
        warnings.warn(f"{file}: ignored, unknown: {', '.join(unknown)}", stacklevel=2)
    return p


class LayerCache:
    """The keys and values of earlier tokens that a layer may still look at: no token's are ever computed twice.

    The key of position p lies in slot p % S. With a window S is fixed, and a new key overwrites one that nobody can
    see any more: a text of any length takes the same memory. Without a window S grows with the text.
    """

    def __init__(self, params: Params, window: int | None, chunk: int, dtype: torch.dtype):
        # A chunk is written before its queries look. The first, at p, looks back to p - window + 1, when the last key
        # already stands at p + chunk - 1: all the positions from here to there need slots of their own.
        size = chunk if window is None else window + chunk - 1
        self.window = window
        # Zeros, not whatever memory held: an empty slot gets weight 0, and 0 * nan would still be nan.
        self.k_SGC = torch.zeros(size, params.n_kv_heads, params.head_dim, dtype=dtype)
        self.v_SGC = torch.zeros_like(self.k_SGC)

    def write(self, positions_T: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Puts the keys and values of new positions into their slots, in place of what lay there."""
        if self.window is None and positions_T[-1] >= len(self.k_SGC):
            # Doubled, so that a long text is moved a few times only; once is enough, as S is at least a chunk.
            more = torch.zeros_like(self.k_SGC)
            self.k_SGC, self.v_SGC = torch.cat([self.k_SGC, more]), torch.cat([self.v_SGC, more])
        slots_T = positions_T % len(self.k_SGC)
        self.k_SGC[slots_T], self.v_SGC[slots_T] = k_TGC, v_TGC

    def visible(self, positions_T: Tensor) -> Tensor:
        """Which slots each query sees, bool [T, S]; to be asked once the same positions are written.

        Slots are in no order, and need none: softmax is a sum, and each key carries its position within (`rope`).
        """
        last, q_T1 = positions_T[-1], positions_T[:, None]
        # A slot holds the newest position p <= last with p % S == slot. If that is negative, it is still empty.
        held_S = last - (last - torch.arange(len(self.k_SGC))) % len(self.k_SGC)
        seen_TS = (held_S >= 0) & (held_S <= q_T1)
        if self.window is not None:
            seen_TS &= held_S > q_T1 - self.window  # `window` keys, the query's own among them
        return seen_TS


@dataclass
class Cache:
    """A sequence's past: one LayerCache a layer, how many tokens were seen, and how many may come in one step."""

    layers: list[LayerCache]
    chunk: int
    length: int = 0


class RMSNorm(nn.Module):
    """Scales each vector to a root mean square of 1, then each of its entries by a learned weight."""

    def __init__(self, params: Params):
        super().__init__()
        self.eps = params.norm_eps
        self.weight = nn.Parameter(torch.empty(params.dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        # float32 for the squares. The weight comes after the cast back: so it was in training, and it shows.
        f = x_TD.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps)).to(x_TD.dtype) * self.weight


def rope(x_THC: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """Rotary position embedding: turns each pair (2i, 2i + 1) of a head's entries by an angle that grows with position.

    The product of a query turned by a and a key turned by b depends on a - b alone: attention learns how far back a key
    lies, and a key stays right in the cache for good. In float32, since the angles of long texts are large.
    """
    even, odd = x_THC.float()[..., 0::2], x_THC.float()[..., 1::2]
    # The first pair turns a radian a token, the last about 1 / theta: the one tells neighbours apart, the other pages.
    speeds = 1.0 / theta ** (torch.arange(0, x_THC.shape[-1], 2).float() / x_THC.shape[-1])
    angles = positions_T.float()[:, None, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_THC.dtype)


class Attention(nn.Module):
    """Each token asks (query), each earlier one offers (key), and the better they match the more of it (value) comes.
    Each key/value head serves R query heads in a row, which makes the cache R times smaller."""

    def __init__(self, params: Params):
        super().__init__()
        self.head_dim, self.n_kv_heads, self.theta = params.head_dim, params.n_kv_heads, params.rope_theta
        self.wq = nn.Linear(params.dim, params.n_heads * params.head_dim, bias=False)
        self.wk = nn.Linear(params.dim, params.n_kv_heads * params.head_dim, bias=False)
        self.wv = nn.Linear(params.dim, params.n_kv_heads * params.head_dim, bias=False)
        self.wo = nn.Linear(params.n_heads * params.head_dim, params.dim, bias=False)

    def forward(self, x_TD: Tensor, positions_T: Tensor, cache: LayerCache) -> Tensor:
        q_THC = rope(self.wq(x_TD).unflatten(-1, (-1, self.head_dim)), positions_T, self.theta)
        k_TGC = rope(self.wk(x_TD).unflatten(-1, (-1, self.head_dim)), positions_T, self.theta)
        v_TGC = self.wv(x_TD).unflatten(-1, (-1, self.head_dim))
        # Write, then look: now a prompt, a piece of one and a single new token are all the same case.
        cache.write(positions_T, k_TGC, v_TGC)
        q_TGRC = q_THC.unflatten(1, (self.n_kv_heads, -1))
        scores_GRTS = torch.einsum("tgrc,sgc->grts", q_TGRC, cache.k_SGC) * self.head_dim**-0.5
        scores_GRTS = scores_GRTS.masked_fill(~cache.visible(positions_T), float("-inf"))
        weights_GRTS = scores_GRTS.softmax(dim=-1, dtype=torch.float32).to(x_TD.dtype)
        return self.wo(torch.einsum("grts,sgc->tgrc", weights_GRTS, cache.v_SGC).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU: w1 decides how far each hidden entry opens, w3 says what passes, w2 brings it back to the stream."""

    def __init__(self, params: Params):
        super().__init__()
        self.w1 = nn.Linear(params.dim, params.hidden_dim, bias=False)
        self.w2 = nn.Linear(params.hidden_dim, params.dim, bias=False)
        self.w3 = nn.Linear(params.dim, params.hidden_dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x_TD)) * self.w3(x_TD))


class MixtureOfExperts(nn.Module):
    """Many feed-forward networks: the model knows as much as all of them, and a token costs as much as its K."""

    def __init__(self, params: Params):
        super().__init__()
        self.n_chosen = params.num_experts_per_tok
        self.gate = nn.Linear(params.dim, params.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(params) for _ in range(params.num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        # A stable sort and not topk: of two equal scores the lower expert wins, always.
        logits_TE, order_TE = self.gate(x_TD).sort(dim=-1, descending=True, stable=True)
        logits_TK, chosen_TK = logits_TE[:, : self.n_chosen], order_TE[:, : self.n_chosen]
        weights_TK = logits_TK.softmax(dim=-1, dtype=torch.float32).to(x_TD.dtype)  # over K, so that they sum to 1
        out_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):  # ascending: the order of a sum is part of its value
            token, k = torch.where(chosen_TK == e)
            out_TD[token] += weights_TK[token, k, None] * expert(x_TD[token])
        return out_TD


class Layer(nn.Module):
    """Two additions to the stream. Each part reads a normalised copy: the stream itself passes untouched."""

    def __init__(self, params: Params):
        super().__init__()
        self.attention_norm = RMSNorm(params)
        self.attention = Attention(params)
        self.ffn_norm = RMSNorm(params)
        self.feed_forward = MixtureOfExperts(params) if params.num_experts else FeedForward(params)

    def forward(self, x_TD: Tensor, positions_T: Tensor, cache: LayerCache) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), positions_T, cache)
        return x_TD + self.feed_forward(self.ffn_norm(x_TD))


class Transformer(nn.Module):
    """The whole model. Its attributes bear the names of the weights on disk, so loading needs no table."""

    def __init__(self, params: Params):
        super().__init__()
        self.params = params
        self.tok_embeddings = nn.Embedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(Layer(params) for _ in range(params.n_layers))
        self.norm = RMSNorm(params)
        self.output = nn.Linear(params.dim, params.vocab_size, bias=False)

    def new_cache(self, chunk: int) -> Cache:
        """The empty past of a new sequence that will bring at most `chunk` tokens in one step."""
        return Cache([LayerCache(self.params, w, chunk, self.norm.weight.dtype) for w in self.params.windows], chunk)

    def forward(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """The sequence's next tokens, int64 [T], T <= cache.chunk → what should follow each, float32 logits [T, V]."""
        if not 0 < len(token_ids) <= cache.chunk:
            raise ValueError(f"{len(token_ids)} tokens in one step; this cache takes 1 to {cache.chunk}")
        positions_T = torch.arange(cache.length, cache.length + len(token_ids))
        x_TD = self.tok_embeddings(token_ids)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_TD = layer(x_TD, positions_T, layer_cache)
        cache.length += len(token_ids)
        return self.output(self.norm(x_TD)).float()


@torch.inference_mode()
def logits(model: Transformer, ids: list[int], chunk: int | None = None) -> Tensor:
    """Float32 [T, V]: row t scores what follows ids[: t + 1]. The same for every chunk size, up to rounding."""
    tokens = torch.as_tensor(ids, dtype=torch.long)
    cache = model.new_cache(chunk or len(tokens))
    return torch.cat([model(part, cache) for part in tokens.split(cache.chunk)])


@torch.inference_mode()
def generate(model: Transformer, ids: list[int], max_tokens: int, eos_id: int | None) -> list[int]:
    """The likeliest next token, again and again: at most `max_tokens` new ids, the last one eos_id if it came up."""
    todo, out = torch.as_tensor(ids, dtype=torch.long), list[int]()
    cache = model.new_cache(min(len(ids), 512))  # a long prompt comes in pieces, or its scores would fill the memory
    while len(out) < max_tokens and eos_id not in out[-1:]:
        for part in todo.split(cache.chunk):  # the prompt at first, then one token a round
            scores = model(part, cache)[-1]
        out.append(int(scores.argmax()))
        todo = torch.tensor(out[-1:])
    return out


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Params]:
    """The model in a folder of params.json and consolidated.safetensors or consolidated.00.pth. Raises Mistake."""
    folder = Path(folder)
    if not (folder / "params.json").is_file():
        raise Mistake(f"{folder}: {'no params.json in it' if folder.is_dir() else 'no such folder'}")
    params = read_params(folder / "params.json")
    file = next((f for f in map(folder.joinpath, WEIGHTS) if f.is_file()), None)
    if file is None:
        raise Mistake(f"{folder}: no weights in it; expected {' or '.join(WEIGHTS)}")
    try:
        # A .pth is a pickle, which could run any program: weights_only lets in nothing but tensors.
        stored = torch.load(file, "cpu", mmap=True, weights_only=True) if file.suffix == ".pth" else load_file(file)
        weights = {name: tensor.to(dtype) for name, tensor in stored.items()}
        if params.tied_embeddings:
            weights["output.weight"] = weights["tok_embeddings.weight"]
        with torch.device("meta"):  # shapes without memory, whose places the weights then take
            model = Transformer(params)
        model.load_state_dict(weights, assign=True)
    except pickle.PickleError:
        raise Mistake(f"{file}: holds something else than tensors, which might be harmful: not loaded") from None
    except (OSError, RuntimeError, EOFError, LookupError, AttributeError, SafetensorError) as error:
        raise Mistake(f"{file}: {' '.join(str(error).split())}") from None
    return model.requires_grad_(False), params


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """mistral-common's tokenizer for tekken.json, or else for the newest tokenizer.model*. Raises Mistake."""
    files = [*folder.glob("tekken.json"), *sorted(folder.glob("tokenizer.model*"), reverse=True)]
    if not files:
        raise Mistake(f"{folder}: no tokenizer in it; expected tekken.json or tokenizer.model")
    parser = tekken.Tekkenizer.from_file if files[0].suffix == ".json" else sentencepiece.SentencePieceTokenizer
    try:
        tokenizer = parser(files[0])
    except Exception as error:  # these parsers may raise anything on a damaged file
        raise Mistake(f"{files[0]}: not a tokenizer: {' '.join(str(error).split())}") from None
    if tokenizer.n_words != vocab_size:
        raise Mistake(f"{files[0]}: {tokenizer.n_words} tokens; params.json says vocab_size = {vocab_size}")
    return tokenizer


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 3 for a folder that holds no usable model."""
    parser = argparse.ArgumentParser(prog="one_file", description="Continue prompts with a Mistral or Mixtral model.")
    parser.add_argument("path", type=Path, help="folder of params.json, weights and tokenizer")
    parser.add_argument("-p", "--prompt", nargs="+", action="extend", help="what to continue")
    parser.add_argument("--max-tokens", "--max_tokens", type=int, default=35, help="how far (default 35)")
    options = parser.parse_args(arguments)
    try:
        model, params = load(options.path)
        tokenizer = load_tokenizer(options.path, params.vocab_size)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 3
    for i, prompt in enumerate(options.prompt or DEMO):
        ids = tokenizer.encode(prompt, bos=True, eos=False)
        if i:
            print("=====================")
        print(tokenizer.decode(ids + generate(model, ids, options.max_tokens, tokenizer.eos_id)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
