"""A checkpoint's tensors into the native model: packed on the way, or mapped where they are packed already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import CacheLayout
from maestrale.checkpoint.dtypes import WEIGHT_DTYPES, StoredTensor, cast
from maestrale.checkpoint.packed import PackedWeight, dequantize, pack_float
from maestrale.checkpoint.reader import Checkpoint
from maestrale.config import ModelConfig
from maestrale.errors import ConfigError
from maestrale.native_backend import kernels

MAX_HEAD_DIM = 1024  # kMaxHead in csrc/attention.h


def load_model(
    checkpoint: Checkpoint,
    layout: CacheLayout,
    weights: str,
    *,
    cache: str,
    threads: int,
    isa: str | None = None,
    layers: range | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, Body]:
    """The extension's Model with its cache, and the weights below its head. `progress` is called with (tensors done,
    tensors in all).

    weights: the format that linear layers get which the folder does not hold packed; those keep theirs. cache: how keys
    and values are kept, "f32", "bf16" or "int8" (codes, and a scale for each position and head). At no time more than
    one tensor exists twice; the embeddings and what is packed already stay mapped from the file. layers: those of a
    pipeline's stage, all where None; only the first stage has the embeddings, only the last the head.
    """
    config, every = checkpoint.config, range(checkpoint.config.n_layers)
    layers = layers or every
    options: dict[str, Any] = {"cache": cache, "threads": threads, "isa": isa}
    model = make_model(config, layout, layers=layers, **options)
    first, last = layers[0] == every[0], layers[-1] == every[-1]
    mine = tuple(f"layers.{i}." for i in layers)
    total = sum(name.startswith(mine) for name in checkpoint.names()) + first + 2 * last
    load = _Loader(checkpoint, weights, threads, total, progress)
    rows = load.embeddings(cache != "f32") if first else None
    # The head first: it is the largest, and while it is packed it is there twice.
    head = load.linear("tok_embeddings.weight" if config.tied_embeddings else "output.weight") if last else None
    loaded = [load.layer(i) for i in layers]
    body = Body(config, layers, rows, loaded, options)
    body.fill(model, layout)
    if head is not None:
        body.norm = load.vector("norm.weight")
        model.set_head(body.norm, kernels.weight(head))
    checkpoint.verify_unchanged()
    return model, body


@dataclass
class Body:
    """The weights below the head, of which several Models may be made, each with a cache of its own."""

    config: ModelConfig
    layers: range
    rows: StoredTensor | None
    loaded: list[dict[str, Any]]
    options: dict[str, Any]
    norm: NDArray[np.float32] | None = None

    def fill(self, model: Any, layout: CacheLayout) -> None:
        if self.rows is not None:
            model.set_embeddings(self.rows.dtype, self.rows.data)
        seen = [0] * len(layout.windows)
        for i, arguments in zip(self.layers, self.loaded, strict=True):
            kind = layout.windows.index(self.config.sliding_window[i])
            model.add_layer(kind, seen[kind], **arguments)
            seen[kind] += 1

    def twin(self, layout: CacheLayout) -> Any:
        """A Model without a head on the same weights."""
        model = make_model(self.config, layout, layers=self.layers, **self.options)
        self.fill(model, layout)
        return model


def make_model(
    config: ModelConfig,
    layout: CacheLayout,
    *,
    cache: str,
    threads: int,
    isa: str | None = None,
    layers: range | None = None,
) -> Any:
    """A Model without weights, with an empty cache of this layout; MemoryError where that does not fit."""
    if config.head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"head_dim = {config.head_dim}: the native backend takes at most {MAX_HEAD_DIM}; use the torch backend"
        )
    with kernels.starting(threads):
        model = kernels.native.Model(
            dim=config.dim,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            hidden_dim=config.hidden_dim,
            vocab_size=config.vocab_size,
            n_chosen=config.moe.num_experts_per_tok if config.moe else 0,
            norm_eps=config.norm_eps,
            speeds=rope_speeds(config),
            page_size=layout.page_size,
            cache=cache,
            isa=kernels.choose_isa(isa),
            threads=threads,
        )
    for window, ring, pages in zip(layout.windows, layout.rings, layout.pages, strict=True):
        count = [config.sliding_window[i] for i in layers or range(config.n_layers)].count(window)
        # Left unwritten, so that a large pool takes memory only where it is used.
        model.add_kind(np.empty(pages * model.page_bytes(count), np.uint8), pages, ring, window, count)
    return model


def rope_speeds(config: ModelConfig) -> NDArray[np.float32]:
    """theta^(-2j / head_dim) [head_dim / 2], in fp32 (N4): what the pair j turns in a position."""
    j = np.arange(0, config.head_dim, 2, dtype=np.float32)
    return (config.rope_theta ** (-j / np.float32(config.head_dim)).astype(np.float64)).astype(np.float32)


class _Loader:
    """Takes tensors one by one and counts them."""

    def __init__(
        self, checkpoint: Checkpoint, weights: str, threads: int, total: int, progress: Callable[[int, int], None]
    ):
        self.checkpoint, self.weights, self.threads, self.progress = checkpoint, weights, threads, progress
        self.pool = kernels.pool(threads)
        self.done, self.total = 0, total

    def layer(self, i: int) -> dict[str, Any]:
        """The arguments of Model.add_layer."""
        moe, prefix = self.checkpoint.config.moe, f"layers.{i}."
        ffn = prefix + "feed_forward."
        parts = [ffn] if moe is None else [f"{ffn}experts.{e}." for e in range(moe.num_experts)]
        wide = self.alike([f"{part}{name}.weight" for part in parts for name in ("w1", "w3")])
        return {
            "attention_norm": self.vector(prefix + "attention_norm.weight"),
            **{
                name: kernels.weight(self.linear(f"{prefix}attention.{name}.weight"))
                for name in ("wq", "wk", "wv", "wo")
            },
            "ffn_norm": self.vector(prefix + "ffn_norm.weight"),
            "gate": None if moe is None else self.vector(ffn + "gate.weight"),
            "w1": wide[::2],
            "w2": self.alike([part + "w2.weight" for part in parts]),
            "w3": wide[1::2],
        }

    def embeddings(self, half: bool) -> StoredTensor:
        """The table of rows where it lies in the file; made anew only where it is stored quantized."""
        self._count()
        name = "tok_embeddings.weight"
        tensor = self.checkpoint.tensor(name)
        return cast(tensor, "BF16") if half and self.checkpoint.storage(name)[0] not in WEIGHT_DTYPES else tensor

    def vector(self, name: str) -> NDArray[np.float32]:
        """A small tensor as fp32, copied."""
        values = cast(self.checkpoint.tensor(name), "F32").array.copy()
        self.checkpoint.release(name)
        self._count()
        return values

    def alike(self, names: Sequence[str]) -> list[Any]:
        """Linear layers that read the same rows: of one format, which is bf16 where the folder holds several."""
        packed = [self.linear(name) for name in names]
        if len({(weight.format, weight.group) for weight in packed}) > 1:
            packed = [pack_float(StoredTensor.from_array(dequantize(weight), "F32"), "bf16") for weight in packed]
        return [kernels.weight(weight) for weight in packed]

    def linear(self, name: str) -> PackedWeight:
        if (packed := self.checkpoint.packed(name)) is None:
            packed = self._pack(name)
            self.checkpoint.release(name)
        self._count()
        return packed

    def _pack(self, name: str) -> PackedWeight:
        tensor = self.checkpoint.tensor(name)
        if self.weights in ("f32", "bf16"):
            words = kernels.pack(self.pool, cast(tensor, {"f32": "F32", "bf16": "BF16"}[self.weights]).array)
            n, k = tensor.shape
            data = words.view(np.float32) if self.weights == "f32" else words.view(np.uint16).reshape(*words.shape, 2)
            return PackedWeight(self.weights, (n, k), data)
        from maestrale.checkpoint.quantize import Recipe  # not on the way of a packed folder
        from maestrale.native_backend.rounding import round_to_nearest

        format, group = Recipe(self.weights).of(name, tensor.shape[1])
        return round_to_nearest(name, tensor, format, group, self.threads)

    def _count(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)
