"""llama.cpp on the stand, through the C functions that llama-cpp-python binds.

Compiled on the machine that it runs on (-march=native), with its own kernels rather than a BLAS, which gives the
fastest Q4_0 and Q8_0 (it repacks Q4_0 for AVX-512 while loading). Sequences decode together, one llama_decode a step,
each with its own part of the cache. Flash attention is on or off, whichever was faster when that kind of work was first
done. Quantized by its own quantizer, all weights alike.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp as lib
import numpy as np
from protocol import serve

FILE_TYPES = {"int4": (lib.LLAMA_FTYPE_MOSTLY_Q4_0, 2), "int8": (lib.LLAMA_FTYPE_MOSTLY_Q8_0, 8)}  # (file, tensor)
WAYS = (lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED)
BATCH = 2048


class LlamaCpp:
    version = f"llama-cpp-python {lib.__version__}"
    settings = "compiled here, -march=native; the faster of flash attention and none; ubatch 512"

    def __init__(self, model: Path, weights: str, threads: int, sequences: int, length: int):
        quiet = lib.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # a callback lives as long as its object
        lib.llama_log_set(quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"{model}: llama.cpp cannot load it")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.threads, self.length = threads, length
        self.context, self.shape = None, (0, 0, 0)
        self.fastest: dict[tuple[int, int], int] = {}  # (sequences, length) → how to attend
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.tokens: list[int] = []
        self.position = 0

    @staticmethod
    def prepare(source: Path, target: Path, weights: str) -> None:
        params = lib.llama_model_quantize_default_params()
        file_type, tensor_type = FILE_TYPES[weights]
        params.ftype, params.pure = file_type, True
        params.output_tensor_type = params.token_embedding_type = tensor_type
        if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
            raise SystemExit(f"{source}: llama.cpp cannot quantize it")

    def prefill(self, prompt: list[int]) -> None:
        shape = (1, len(prompt) + 1)
        if shape not in self.fastest:
            self._choose(shape, lambda: self._read(shape, self.shape[2], prompt))
        self._read(shape, self.fastest[shape], prompt)

    def _read(self, shape: tuple[int, int], way: int, prompt: list[int]) -> None:
        self._open_context(*shape, way)
        self._compute([prompt])

    def start(self, prompts: list[list[int]]) -> None:
        shape = (len(prompts), self.length)
        if shape not in self.fastest:
            self._choose(shape, self.step)
        self._open_context(*shape, self.fastest[shape])
        self._compute(prompts)

    def step(self) -> None:
        size = len(self.tokens)
        self.tokens = self._decode(self.tokens, [self.position] * size, range(size), set(range(size)))
        self.position += 1

    def _compute(self, prompts: list[list[int]]) -> None:
        self.tokens = []
        for number, prompt in enumerate(prompts):
            last = {len(prompt) - 1}
            self.tokens += self._decode(prompt, range(len(prompt)), [number] * len(prompt), last)
        self.position = len(prompts[0])

    def _choose(self, shape: tuple[int, int], run: Callable[[], None]) -> None:
        """Notes which way is faster in a context of that shape, where each sequence has some tokens already."""
        seconds = {}
        for way in WAYS:
            self._open_context(*shape, way)
            self._compute([list(range(3, 19))] * shape[0])
            self.step()
            start = time.perf_counter()
            run()
            seconds[way] = time.perf_counter() - start
        self.fastest[shape] = min(WAYS, key=seconds.__getitem__)

    def _open_context(self, sequences: int, length: int, way: int) -> None:
        """An empty cache of that shape."""
        length = -(-length // 256) * 256
        if self.shape == (sequences, length, way):
            lib.llama_memory_clear(lib.llama_get_memory(self.context), False)
            return
        if self.context:
            lib.llama_free(self.context)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * length, sequences
        params.n_batch, params.n_ubatch = BATCH, 512
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = way
        params.no_perf = True
        self.context, self.shape = lib.llama_init_from_model(self.model, params), (sequences, length, way)

    def _decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: set[int]
    ) -> list[int]:
        """One batch; the greedy tokens of its rows in `wanted`."""
        self.batch.n_tokens = len(tokens)
        rows = zip(tokens, positions, sequences, strict=True)
        for row, (token, position, sequence) in enumerate(rows):
            self.batch.token[row], self.batch.pos[row] = token, position
            self.batch.n_seq_id[row], self.batch.seq_id[row][0] = 1, sequence
            self.batch.logits[row] = row in wanted
        if lib.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        return [
            int(np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, row), (self.vocabulary,)).argmax())
            for row in sorted(wanted)
        ]


if __name__ == "__main__":
    serve(LlamaCpp)
