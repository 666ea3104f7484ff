"""What fp8 (e4m3) costs: perplexity of the bundled models with weights, cache or both rounded to it, on the CPU.

    python bench/fp8_quality.py [--text tests/heldout_stories.txt] [--pieces 200]

Weights: every linear layer's (no norm, embedding or router), rounded to nearest on one scale for each output, as
torch_backend/triton/packed.py holds them. Cache: the one of `--cache fp8` (torch_backend/cache.py). All
else is fp32, so only the rounding is judged. Pieces of 256 tokens, one token's context at least. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from maestrale.batch import Batch, CacheLayout
from maestrale.checkpoint.packed_room import is_linear
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.launch import model_folder
from maestrale.sampling.policy import log_softmax
from maestrale.text.tokenizer import load_tokenizer
from maestrale.torch_backend.load import load_model
from maestrale.torch_backend.ops.groups import FP8
from maestrale.torch_backend.runner import TorchRunner

PIECE = 256


def round_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_linear(name):
            scales = parameter.abs().amax(1, keepdim=True) / torch.finfo(FP8).max
            parameter.copy_((parameter / scales.clamp(min=1e-30)).to(FP8).float() * scales)


def perplexity(runner: TorchRunner, pieces: list[list[int]]) -> float:
    total, count = 0.0, 0
    pages = np.arange(runner.layout.rings[0])[None]
    tables, none = (pages,) * len(runner.layout.rings), (np.empty((0, 2), np.int64),) * len(runner.layout.rings)
    for piece in pieces:
        ids, n = np.array(piece), len(piece)
        logits = runner.step(Batch(ids, np.arange(n), np.array([0, n]), tables, none, np.arange(n))).logits
        total -= log_softmax(logits[:-1])[np.arange(n - 1), ids[1:]].sum(dtype=np.float64)
        count += n - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "tests" / "heldout_stories.txt")
    parser.add_argument("--pieces", type=int, default=200)
    arguments = parser.parse_args()
    rows = []
    for name in ("stories", "stories-moe"):
        with open_checkpoint(model_folder(name)) as checkpoint:
            config = checkpoint.config
            tokenizer = load_tokenizer(model_folder(name), config.vocab_size)
            model = load_model(checkpoint, torch.float32, torch.device("cpu"))
            model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
        model.requires_grad_(False)
        ids = tokenizer.encode(arguments.text.read_text(), bos=False)
        step = PIECE - 1
        pieces = [[tokenizer.bos_id, *ids[i : i + step]] for i in range(0, len(ids) - step, step)][: arguments.pieces]
        pages = (PIECE // 16,) * len(config.windows)
        layout = CacheLayout(16, PIECE, PIECE, config.windows, pages, pages)
        base = 0.0
        for weights in (False, True):
            if weights:
                round_weights(model)
            for cache in (False, True):
                found = perplexity(TorchRunner(model, layout, fp8_cache=cache), pieces)
                base = base or found
                form = " and ".join(part for part, on in (("weights", weights), ("cache", cache)) if on) or "fp32"
                rows.append({"model": name, "fp8": form, "perplexity": found, "change": found / base - 1})
                print(f"{name:12} {form:20} {found:9.4f} {found / base - 1:+8.3%}", flush=True)
    print(json.dumps({"tokens": len(pieces) * step, "rows": rows}))


if __name__ == "__main__":
    main()
