"""ONNX Runtime GenAI on the stand: a generator for each batch, on the model that its own builder writes for processors
(int4: blocks of 32, products in int8, accuracy level 4, which is its fastest)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from protocol import serve
from tokenizer_stub import with_tokenizer


class OnnxRuntime:
    version = f"onnxruntime-genai {genai.__version__}"
    settings = "int4 blocks of 32, accuracy level 4"

    def __init__(self, model: Path, weights: str, threads: int, sequences: int, length: int):
        config = genai.Config(str(model))
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        self.model = genai.Model(config)
        self.length = length
        self.generator: Any = None

    @staticmethod
    def prepare(source: Path, target: Path, weights: str) -> None:
        with with_tokenizer(source) as folder:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(target)]
            command += ["-p", weights, "-e", "cpu", "-c", str(target) + ".cache", "--extra_options"]
            command += ["int4_block_size=32", "int4_accuracy_level=4", "int4_is_symmetric=true"]
            subprocess.run(command, check=True)

    def prefill(self, prompt: list[int]) -> None:
        self._open([prompt], len(prompt) + 1)

    def start(self, prompts: list[list[int]]) -> None:
        self._open(prompts, self.length)

    def step(self) -> None:
        self.generator.generate_next_token()

    def _open(self, prompts: list[list[int]], length: int) -> None:
        """A generator that has computed the prompts and chosen the token after each."""
        params = genai.GeneratorParams(self.model)
        params.set_search_options(
            max_length=length, min_length=length, batch_size=len(prompts), do_sample=False, early_stopping=False
        )
        self.generator = None  # its cache goes before the next one comes
        self.generator = genai.Generator(self.model, params)
        self.generator.append_tokens(np.array(prompts, np.int32))
        self.generator.generate_next_token()


if __name__ == "__main__":
    serve(OnnxRuntime)
