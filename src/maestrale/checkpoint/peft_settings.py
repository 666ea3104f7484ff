"""adapter_config.json as PEFT has it: how modules are named, and the rank and scale of each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maestrale.checkpoint.hf import hf_name
from maestrale.checkpoint.jsonfile import read_json
from maestrale.errors import CheckpointError, shown

LARGEST_SCALE = float(np.finfo(np.float32).max)  # a scale is multiplied in float32
_PREFIX = "base_model.model."
# Settings of PEFT that change the numbers in ways unknown here → the value that does not.
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
}
# Weights of the base model that PEFT writes beside an adapter that touches the head, as they were.
BASE_COPIES = {_PREFIX + n for n in ("lm_head.base_layer.weight", "lm_head.weight", "model.embed_tokens.weight")}
_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*){1,200}\$?")
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base model's weights as well


class PeftSettings:
    """adapter_config.json, checked: how modules are named, and each one's rank and scale."""

    permuted = True

    def __init__(self, source: Path):
        self.settings, self.source = read_json(source), source
        if (kind := self.settings.get("peft_type")) != "LORA":
            raise CheckpointError(f"{source}: peft_type = {kind!r}: expected LORA")
        for key, plain in _PLAIN.items():
            if (value := self.settings.get(key, plain)) not in (plain, None, [], {}):
                raise CheckpointError(
                    f"{source}: {key} = {shown(value)}: expected {plain!r}, nothing else is supported"
                )
        if (start := self.settings.get("init_lora_weights", True)) not in _PLAIN_STARTS:
            raise CheckpointError(
                f"{source}: init_lora_weights = {shown(start)} changes the base model's weights: "
                "convert the adapter to a plain one with peft first"
            )
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = self.settings.get(key) or {}
            if not isinstance(patterns, dict) or not all(map(_is_harmless, patterns)):
                raise CheckpointError(
                    f"{source}: {key} = {shown(patterns)}: expected modules (. and .* allowed) and numbers"
                )

    def module(self, name: str) -> str:
        return module(name)

    def rank(self, name: str) -> int:
        rank = self._value("r", "rank_pattern", name)
        if type(rank) is not int or not 1 <= rank < 1 << 20:
            raise CheckpointError(f"{self.source}: r = {shown(rank)}: expected a whole number of at least 1")
        return rank

    def scale(self, name: str) -> float:
        alpha, rank = self._value("lora_alpha", "alpha_pattern", name), self.rank(name)
        if type(alpha) not in (int, float) or not 0 < alpha <= LARGEST_SCALE:
            raise CheckpointError(
                f"{self.source}: lora_alpha = {shown(alpha)}: expected a number above 0 that float32 holds"
            )
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _value(self, key: str, patterns: str, name: str) -> Any:
        """That of the first pattern that a module's name ends with, else the general one."""
        for pattern, special in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", _hf_module(name)):
                return special
        return self.settings.get(key)


def to_settings(layers: Mapping[str, tuple[int, float]], rank: int, scale: float, dora: bool) -> dict[str, Any]:
    """adapter_config.json of these layers. layers: canonical name → (rank, scale). rank, scale: those of most."""
    alpha = scale * rank
    alphas = {name: own_scale * own_rank for name, (own_rank, own_scale) in layers.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({_hf_module(name).rpartition(".")[2] for name in layers}),
        "rank_pattern": {_hf_module(name): own_rank for name, (own_rank, _) in layers.items() if own_rank != rank},
        "alpha_pattern": {_hf_module(name): own_alpha for name, own_alpha in alphas.items() if own_alpha != alpha},
        "use_dora": dora,
        "use_rslora": False,
    }


def module(name: str) -> str:
    """What PEFT's file calls a linear layer of a canonical name."""
    return _PREFIX + _hf_module(name)


def _is_harmless(pattern: str) -> bool:
    """Whether a pattern is one of those that PEFT's configurations hold: nothing that could run for long."""
    return bool(_PATTERN.fullmatch(pattern)) and pattern.count("*") <= 4


def _hf_module(name: str) -> str:
    return hf_name(f"{name}.weight").removesuffix(".weight")
