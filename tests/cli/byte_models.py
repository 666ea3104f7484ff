"""Tiny models of bytes (each byte a token, after 32 control tokens), and what a run of the command line gives."""

import json
import os
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from safetensors.torch import save_file
from tiny import DENSE, MIXED, WINDOWED

TINY = {"dense": DENSE, "windowed": WINDOWED, "mixed": MIXED}
CONFIGS = {name: replace(config, vocab_size=288) for name, config in TINY.items()}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONWARNINGS": "error"}


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


def byte_ids(text: str) -> list[int]:
    """What the tokenizer of these models makes of a text: 1 begins it, byte b is 32 + b."""
    return [1, *(32 + byte for byte in text.encode())]


def byte_text(ids: list[int]) -> str:
    """The text of ids; a control token shows nothing and ends an unfinished character."""
    runs = groupby(ids, key=lambda i: i >= 32)
    return "".join(bytes(i - 32 for i in run).decode(errors="replace") for shown, run in runs if shown)


def native_adapter(folder, scale=1.0):
    """A random adapter for the dense model of CONFIGS."""
    draw = torch.Generator().manual_seed(0)
    stored = {}
    for layer in range(2):
        stored[f"layers.{layer}.attention.wv.lora_A.weight"] = torch.randn(2, 32, generator=draw)
        stored[f"layers.{layer}.attention.wv.lora_B.weight"] = torch.randn(16, 2, generator=draw) * scale
    folder.mkdir()
    save_file(stored, folder / "lora.safetensors")
    (folder / "params.json").write_text(json.dumps({"lora": {"rank": 2, "scaling": 0.5}}))
    return folder
