"""CTranslate2 on the stand: generate_batch with a callback that holds it after each step until the next one is due."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
from protocol import serve
from tokenizer_stub import with_tokenizer

COMPUTE = {"int8": "int8_bfloat16", "bf16": "bfloat16"}


class CTranslate2:
    version = f"ctranslate2 {ctranslate2.__version__}"
    settings = "generate_batch, flash attention off"

    def __init__(self, model: Path, weights: str, threads: int, sequences: int, length: int):
        compute = COMPUTE[weights]
        if weights == "int8" and compute not in ctranslate2.get_supported_compute_types("cpu"):
            compute = "int8_float32"  # what it has on a processor on which it has no bfloat16
        self.generator = ctranslate2.Generator(
            str(model), device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads
        )
        self.pieces = json.loads((model / "vocabulary.json").read_text())
        self.length = length
        self.thread: threading.Thread | None = None

    @staticmethod
    def prepare(source: Path, target: Path, weights: str) -> None:
        program = str(Path(sys.executable).with_name("ct2-transformers-converter"))
        with with_tokenizer(source) as folder:
            command = [program, "--model", str(folder), "--output_dir", str(target), "--quantization", COMPUTE[weights]]
            subprocess.run(command, check=True)

    def prefill(self, prompt: list[int]) -> None:
        self._end()
        self._generate([prompt], 1, lambda step: False)

    def start(self, prompts: list[list[int]]) -> None:
        self._end()
        self.size, self.ended = len(prompts), False
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.seen = 0

        def hold(result: ctranslate2.GenerationStepResult) -> bool:
            """Called for each sequence of a step in turn; the last one waits."""
            self.seen += 1
            if self.seen % self.size == 0:
                self.done.release()
                self.asked.acquire()
            return self.ended

        most = self.length - len(prompts[0])
        self.thread = threading.Thread(target=self._generate, args=(prompts, most, hold), daemon=True)
        self.thread.start()
        self.done.acquire()

    def step(self) -> None:
        self.asked.release()
        self.done.acquire()

    def _end(self) -> None:
        if self.thread:
            self.ended = True
            self.asked.release(self.length)
            self.thread.join()
            self.thread = None

    def _generate(self, prompts: list[list[int]], tokens: int, callback: Callable[[Any], bool]) -> None:
        self.generator.generate_batch(
            [[self.pieces[token] for token in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=callback,
        )


if __name__ == "__main__":
    serve(CTranslate2)
