"""vLLM for processors on the stand: its engine in this process, stepped by hand, in bfloat16 as stored.

Without prefix caching, whole prompts in one step, threads bound to the cores that the process has.
"""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import vllm
from protocol import serve
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine


class Vllm:
    version = f"vllm {vllm.__version__}"
    settings = "LLMEngine in one process, no prefix cache"

    def __init__(self, model: Path, weights: str, threads: int, sequences: int, length: int):
        arguments = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=length,
            max_num_seqs=sequences,
            max_num_batched_tokens=max(2048, length),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self.length = length
        self.running: list[str] = []
        self.added = 0

    @staticmethod
    def prepare(source: Path, target: Path, weights: str) -> None:
        raise SystemExit("vLLM loads the Hugging Face folder as it is")

    def prefill(self, prompt: list[int]) -> None:
        self._end()
        self._submit(prompt, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def start(self, prompts: list[list[int]]) -> None:
        self._end()
        self.running = [self._submit(prompt, self.length - len(prompt)) for prompt in prompts]
        waiting = set(self.running)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}

    def step(self) -> None:
        self.engine.step()

    def _submit(self, prompt: list[int], tokens: int) -> str:
        self.added += 1
        name = str(self.added)
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _end(self) -> None:
        self.engine.abort_request(self.running)
        self.running = []


if __name__ == "__main__":
    serve(Vllm)
