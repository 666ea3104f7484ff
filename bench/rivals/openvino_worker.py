"""OpenVINO GenAI on the stand: its continuous batching pipeline, which steps as ours does. optimum-intel and NNCF write
its weights (int4: symmetric, groups of 32, every layer and the head; int8: symmetric, a scale a row).

Latency hint, prefix caching off, activations quantized on the fly in groups of its own choice (its default). The
cache's precision is its default too (u8): a setting of ours in int8 would be nearest, and theirs is the fastest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from protocol import serve

COMPRESSION = {
    "int4": ["--weight-format", "int4", "--sym", "--group-size", "32", "--ratio", "1.0", "--all-layers"],
    "int8": ["--weight-format", "int8", "--sym"],
    "bf16": ["--weight-format", "fp16"],
}


class OpenVino:
    version = f"openvino {openvino.__version__.split('-')[0]}"
    settings = "continuous batching, latency hint, no prefix cache"

    def __init__(self, model: Path, weights: str, threads: int, sequences: int, length: int):
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2048, sequences
        scheduler.cache_size = 1 if sequences == 1 else 4
        scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = False, True
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if weights == "bf16":
            properties["INFERENCE_PRECISION_HINT"] = "bf16"
        self.pipeline = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self.length = length
        self.running: list[genai.GenerationHandle] = []
        self.added = 0

    @staticmethod
    def prepare(source: Path, target: Path, weights: str) -> None:
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(source)]
        command += ["--task", "text-generation-with-past", *COMPRESSION[weights], str(target)]
        subprocess.run(command, check=True)

    def prefill(self, prompt: list[int]) -> None:
        self._end()
        handle = self._submit(prompt, 1)
        while handle.get_status() == genai.GenerationStatus.RUNNING:
            self.pipeline.step()
        handle.read_all()

    def start(self, prompts: list[list[int]]) -> None:
        self._end()
        self.running = [self._submit(prompt, self.length - len(prompt)) for prompt in prompts]
        waiting = list(self.running)
        while waiting:
            self.pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]

    def step(self) -> None:
        self.pipeline.step()

    def _submit(self, prompt: list[int], tokens: int) -> genai.GenerationHandle:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample = True, False
        self.added += 1
        return self.pipeline.add_request(self.added, openvino.Tensor(np.array([prompt], np.int64)), config)

    def _end(self) -> None:
        for handle in self.running:
            handle.cancel()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        self.running = []


if __name__ == "__main__":
    serve(OpenVino)
