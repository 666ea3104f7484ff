"""LLM: the Python face. Everything above the engine reaches it through here."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import Embedding
from maestrale.choices import Options
from maestrale.config import ModelConfig
from maestrale.engine.counters import Counters
from maestrale.engine.request import Completion, Request
from maestrale.errors import CheckpointError, RequestError, UsageError, shown
from maestrale.interrupts import held_back
from maestrale.launch import launch
from maestrale.sampling.constraint import read_constraint
from maestrale.sampling.params import SamplingParams
from maestrale.text.tokenizer import Tokenizer

__all__ = ["LLM", "Completion", "Request"]

Prompt = str | Sequence[int]
NO_VECTORS = "embeddings and classes are not computed over several ranks: start a single process"
_TELL_EVERY = 0.1  # seconds, of progress


class LLM:
    """A model folder, ready to run.

    path: a native (params.json) or Hugging Face (config.json) folder; None is the bundled model.
    dtype: what it computes in: "auto" (as stored), "float32", "bfloat16", "float16".
    weights: of the linear layers: "auto" (as stored), "bf16", or "int8", "int4", quantized while they are loaded;
        "fp8" likewise by the Triton kernels (docs/gpu.md).
    device: "auto", "cpu", "cuda", "cuda:1" … backend: "auto" (torch on a GPU, else native), "native", "torch".
    max_len: longest prompt and completion together, in tokens; None takes the model's own, or what memory allows.
    max_batch_tokens: most tokens computed in one step, so also the longest chunk of a prompt.
    max_sequences: most sequences that run at once; others wait.
    num_pipeline_ranks, tensor_parallel, expert_parallel: under torchrun or mpirun, how the ranks divide the model;
        None is what the number of ranks leaves. On other ranks than 0 the call does not return.
    ignore_unexpected: go on where the files hold tensors that the model has no place for, else a CheckpointError.
    distributed_timeout: seconds after which a rank that should have answered counts as hanging.
    adapters: name → folder of a LoRA adapter, PEFT's or native; a request names the one it goes through, and requests
    of several run in one batch.
    require_tokenizer: refuse a folder without a tokenizer at once, not when text is first needed.
    cache: of keys and values: "auto" (as computed), or, in half the memory of bfloat16, "int8" (native) or "fp8"
        (torch).
    threads: how many compute, native only; None takes what MAESTRALE_THREADS says, else one for each core.
    prefix_cache: keep the pages of what was computed, for prompts that begin alike.
    speculate: look up in a text what may come next, and check it in the step of the token before. No text depends on
    either.
    progress: called with (tensors loaded, tensors in all) while the weights are read.

    generate, stream, chat and logits may be called from several threads, which share each step.

    Raises UsageError, ConfigError, CheckpointError, MemoryLimitError or DistributedError, before any weight is read
    where possible.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        dtype: str = "auto",
        weights: str = "auto",
        device: str = "auto",
        backend: str = "auto",
        max_len: int | None = None,
        max_batch_tokens: int | None = None,
        *,
        max_sequences: int = 64,
        ignore_unexpected: bool = False,
        num_pipeline_ranks: int | None = None,
        tensor_parallel: int | None = None,
        expert_parallel: int = 1,
        distributed_timeout: float = 120.0,
        adapters: Mapping[str, str | Path] | None = None,
        require_tokenizer: bool = False,
        threads: int | None = None,
        cache: str = "auto",
        prefix_cache: bool = True,
        speculate: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        options = Options(
            dtype,
            weights,
            device,
            backend,
            max_len,
            max_batch_tokens,
            max_sequences,
            ignore_unexpected,
            threads=threads,
            cache=cache,
            prefix_cache=prefix_cache,
            speculate=speculate,
            num_pipeline_ranks=num_pipeline_ranks,
            tensor_parallel=tensor_parallel,
            expert_parallel=expert_parallel,
            distributed_timeout=distributed_timeout,
            adapters=adapters or {},
        )
        self._launched = launch(path, options, require_tokenizer, progress)
        self._engine = self._launched.engine
        self._lock, self._process = threading.RLock(), os.getpid()
        # Each request's queue of pieces; one for all of a run.
        self._news: dict[Request, deque[tuple[Request, Completion]]] = {}

    @property
    def config(self) -> ModelConfig:
        return self._launched.config

    @property
    def description(self) -> str:
        """How it runs, in a few words: backend, device, dtype."""
        return self._launched.description

    @property
    def max_len(self) -> int:
        """The longest prompt and completion together, in tokens."""
        return self._engine.runner.layout.max_len

    @property
    def tokenizer(self) -> Tokenizer:
        """CheckpointError, saying why, where the folder has none that fits."""
        if self._launched.tokenizer is None:
            raise self._launched.tokenizer_error or RuntimeError("no tokenizer")
        return self._launched.tokenizer

    def counters(self) -> Counters:
        """What the engine has done so far, and what it holds. May be called from any thread."""
        return self._engine.counters()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Completion]:
        """Continues one prompt or many, batched; text or token ids, one SamplingParams or one for each prompt, and
        likewise the name of an adapter.

        Returns the completions in the order of the prompts, n for each. RequestError for a request that cannot be
        served; then none is. `progress` is called now and then, and at the end, with (tokens known to be done, most
        there can be), prompts included.
        """
        requests = self._submit(*_pair(prompts, params), adapter=adapter)
        for _ in self._run(requests, progress):
            pass
        return [completion for request in requests for completion in _ordered(request)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        reply: bool = False,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Iterator[Completion]:
        """As `generate`, but yields what each step adds. `index` tells continuations apart: prompt i's n
        continuations have i * n to i * n + n - 1. reply: the text begins anew, as the answer in a chat does, and does
        not go on from the prompt's (no space between the two). A step that only reads on in the prompts yields an
        empty piece, so that a caller may stop there."""
        requests = self._submit(*_pair(prompts, params), reply=reply, adapter=adapter)
        first = dict(zip(requests, np.cumsum([0] + [r.params.n for r in requests]).tolist(), strict=False))
        for request, piece in self._run(requests):
            piece.index += first[request]
            yield piece

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        *,
        adapter: str | None = None,
    ) -> Completion:
        """The assistant's answer to OpenAI-style messages, in the model's own chat form.

        With tools its `tool_calls` are those that it makes; each fits its function's schema, unless the answer was
        cut off (finish_reason "length"). tool_choice: "auto", "none", "required", or {"type": "function", "function":
        {"name": …}}. adapter: the name of the one to go through.
        """
        params = params or SamplingParams()
        if params.n > 1:
            raise RequestError(f"n = {params.n}: a chat has one answer: expected 1", "n")
        ids = self.tokenizer.encode_chat(messages, tools)
        if tools or tool_choice:
            content = read_constraint(params.constraint)
            constraint = self.tokenizer.tool_constraint(tools, tool_choice, parallel_tool_calls, content)
            params = replace(params, constraint=constraint)
        (request,) = requests = self._submit([ids], [params], reply=True, adapter=adapter)
        for _ in self._run(requests):
            pass
        answer = _ordered(request)[0]
        if tools:
            answer.text, calls = self.tokenizer.read_calls(str(ids)).push(answer.token_ids, answer.text, ended=True)
            answer.tool_calls = calls
            if calls and answer.finish_reason == "stop":
                answer.finish_reason = "tool_calls"
        return answer

    def logits(
        self,
        list_of_token_ids: Sequence[Sequence[int]],
        chunk_size: int | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Float32 [n_tokens, vocab] for each sequence: row i scores what follows token i.

        chunk_size: the most tokens of one sequence computed in a step; the answer does not depend on it.
        """
        if chunk_size is not None and chunk_size < 1:
            raise RequestError(f"chunk_size = {chunk_size}: expected a whole number of at least 1", "chunk_size")
        score = SamplingParams(max_tokens=0)
        scores = [score] * len(list_of_token_ids)
        requests = self._submit(list_of_token_ids, scores, chunk_size, keep_logits=True, adapter=adapter)
        for _ in self._run(requests):
            pass
        return [np.stack(request.logits or []) for request in requests]

    # A thread that drives the model step by step, as a server does, uses these and no other method besides.

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        reply: bool = False,
        namespace: str = "",
        adapter: str | None = None,
    ) -> Request:
        """Queues a prompt of token ids. RequestError where it cannot be served. `reply`, `adapter` as for `stream`;
        namespace: cached pages are shared only with prompts of the same one."""
        return self._engine.submit(ids, params, reply=reply, namespace=namespace, adapter=adapter)

    def step(self) -> list[tuple[Request, Completion]]:
        """One batch: what is new, and for whom. A request that has ended is `finished`, perhaps with an `error`."""
        return self._engine.step()

    def abort(self, request: Request) -> None:
        """Ends a request; its pages are free at once. Harmless where it has ended already."""
        self._engine.abort(request)

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def embed(self, texts: Sequence[Sequence[int]], last: bool = False) -> Iterator[list[NDArray[np.float32]] | None]:
        """What the output layer would read of each text, float32 [dim]: the mean over its tokens, or that of its `last`
        one; before them a None for each chunk, where a server may do something else. RequestError where a text is too
        long, or the model cannot do it."""
        runner = self._engine.runner
        if not isinstance(runner, Embedding):
            raise RequestError(NO_VECTORS, "model")
        for ids in texts:
            if not 0 < len(ids) <= self.max_len:
                raise RequestError(f"input: a text of {len(ids)} tokens: expected 1 to {self.max_len}", "input")
            if min(ids) < 0 or max(ids) >= self.config.vocab_size:
                raise RequestError(f"input: expected token ids from 0 to {self.config.vocab_size - 1}", "input")
        return _finite(runner.embed(texts, last))

    def _submit(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        chunk_size: int | None = None,
        keep_logits: bool = False,
        reply: bool = False,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Request]:
        if os.getpid() != self._process:
            raise UsageError("this LLM was opened before a fork, which its threads did not survive: open one after it")
        for prompt in prompts:
            if not isinstance(prompt, (Sequence, np.ndarray)):
                raise RequestError(f"prompts: expected texts or lists of token ids, got {shown(prompt)}", "prompts")
        adapters = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(adapters) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts and {len(adapters)} adapters: expected one for each", "adapter")
        requests: list[Request] = []
        try:
            for prompt, asked, name in zip(prompts, params, adapters, strict=True):
                ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                with held_back(), self._lock:
                    requests.append(
                        self._engine.submit(
                            ids, asked, chunk_size=chunk_size, keep_logits=keep_logits, reply=reply, adapter=name
                        )
                    )
        except BaseException:
            self._abort(requests)
            raise
        return requests

    def _run(
        self, requests: list[Request], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[tuple[Request, Completion]]:
        """Steps until all of `requests` have ended; however it is left, none of them stays in the engine. Ctrl-C waits
        for the end of a step; a second one breaks it off.

        Several of these may run in turns (two streams read alternately) or in threads: a step's news go to whom they
        belong.
        """
        news: deque[tuple[Request, Completion]] = deque()
        self._news.update(dict.fromkeys(requests, news))
        # Of thousands of requests few run at a time: a step must not look at all of them.
        unfinished, total, failed, told = deque(requests), sum(r.length_limit for r in requests), -1, -math.inf
        try:
            while True:
                while news:
                    yield news.popleft()
                if failed != self._engine.failed:
                    failed = self._engine.failed
                    if error := next((request.error for request in requests if request.error), None):
                        raise error
                while unfinished and unfinished[0].finished:
                    unfinished.popleft()
                if not unfinished or time.monotonic() > told + _TELL_EVERY:
                    progress(sum(request.done for request in requests), total)
                    told = time.monotonic()
                if not unfinished:
                    return
                with held_back(), self._lock:
                    for request, piece in self._engine.step():
                        self._news[request].append((request, piece))
                if not news:
                    yield requests[0], Completion()  # a chunk of a prompt: nothing new, but a moment to stop at
        finally:
            self._abort(requests)

    def _abort(self, requests: list[Request]) -> None:
        with held_back(), self._lock:
            for request in requests:
                self._engine.abort(request)
                self._news.pop(request, None)


def _pair(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> tuple[Sequence[Prompt], Sequence[SamplingParams]]:
    """One prompt → a list of one; one SamplingParams → one for each prompt."""
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
    many = cast(Sequence[Prompt], [prompts] if one else prompts)
    if params is None or isinstance(params, SamplingParams):
        return many, [params or SamplingParams()] * len(many)
    if len(params) != len(many):
        raise RequestError(f"{len(many)} prompts and {len(params)} SamplingParams: expected one for each", "params")
    return many, params


def _finite(found: Iterator[list[NDArray[np.float32]] | None]) -> Iterator[list[NDArray[np.float32]] | None]:
    for vectors in found:
        if vectors is not None and not all(np.isfinite(vector).all() for vector in vectors):
            raise CheckpointError(
                "a text's vector holds numbers that are not finite: the model or its weights are damaged"
            )
        yield vectors


def _ordered(request: Request) -> list[Completion]:
    return sorted(request.completions, key=lambda completion: completion.index)
