"""transformers on the stand: inference_mode, DynamicCache, sdpa without a mask (all sequences are of one length),
logits of the last position only, and on a mixture the faster of its experts implementations for each kind of step."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers
from protocol import serve

EXPERTS = ("eager", "grouped_mm")  # batched_mm copies the weights of each token's experts: 47 GB at pre-fill


class Transformers:
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    settings = "forward calls, sdpa, DynamicCache"

    def __init__(self, model: Path, weights: str, threads: int, sequences: int, length: int):
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.mixture = hasattr(self.model.config, "num_local_experts")
        self.fastest: dict[tuple[int, ...], str] = {}

    @staticmethod
    def prepare(source: Path, target: Path, weights: str) -> None:
        raise SystemExit("transformers loads the Hugging Face folder as it is")

    def prefill(self, prompt: list[int]) -> None:
        self._forward(torch.tensor([prompt]), transformers.DynamicCache())

    def start(self, prompts: list[list[int]]) -> None:
        self.cache = transformers.DynamicCache()
        self.ids = self._forward(torch.tensor(prompts), self.cache)

    def step(self) -> None:
        self.ids = self._forward(self.ids, self.cache)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, cache: transformers.DynamicCache) -> torch.Tensor:
        if self.mixture:
            self.model.set_experts_implementation(self._experts(ids))
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def _experts(self, ids: torch.Tensor) -> str:
        """What was faster on a batch of this shape, tried once with a cache of its own."""
        if tuple(ids.shape) not in self.fastest:
            seconds = {}
            for way in 2 * EXPERTS:  # the second round counts
                self.model.set_experts_implementation(way)
                start = time.perf_counter()
                self.model(ids, past_key_values=transformers.DynamicCache(), use_cache=True, logits_to_keep=1)
                seconds[way] = time.perf_counter() - start
            self.fastest[tuple(ids.shape)] = min(seconds, key=seconds.__getitem__)
        return self.fastest[tuple(ids.shape)]


if __name__ == "__main__":
    serve(Transformers)
