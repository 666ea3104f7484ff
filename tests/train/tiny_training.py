"""Tiny models, their settings and documents of random tokens."""

from __future__ import annotations

import numpy as np

from maestrale.config import ModelConfig, MoeConfig
from maestrale.torch_backend.train.settings import TrainSettings


def tiny_config(**changes) -> ModelConfig:
    values = {
        "dim": 16,
        "n_layers": 2,
        "head_dim": 8,
        "hidden_dim": 24,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 320,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": (5, 5),
        "tied_embeddings": True,
    }
    return ModelConfig(**{**values, **changes})


def tiny_mixture(**changes) -> ModelConfig:
    return tiny_config(moe=MoeConfig(num_experts=4, num_experts_per_tok=2), sliding_window=(None, None), **changes)


def tiny_settings(model: ModelConfig | None = None, **changes) -> TrainSettings:
    values = {"train": ("*.txt",), "heldout": "heldout.txt", "out": "out", "steps": 6, "seq_len": 16, "batch_size": 4}
    return TrainSettings(**{"model": model or tiny_config(), **values, "micro_batch": 2, "warmup_steps": 2, **changes})


def random_documents(*lengths: int, vocab_size: int = 320) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [[1, *generator.integers(3, vocab_size, length - 2).tolist(), 2] for length in lengths]
